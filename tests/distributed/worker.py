"""Trains a tiny model with a callback and leaves what this rank ended with; started by torchrun or alone."""

import json
import os
import sys

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from mama_trl import MamaCallback, MamaConfig
from tests.conftest import tiny


def main(folder: str, batch: int) -> None:
    rows = torch.randint(2, 384, (64, 24), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")
    mama = MamaCallback(MamaConfig(sparsity=0.8, mask_schedule="cubic", mask_start=3, mask_end=5, mask_interval=2))
    args = TrainingArguments(
        output_dir=folder, use_cpu=True, max_steps=6, per_device_train_batch_size=batch, report_to=[],
        disable_tqdm=True, save_strategy="no", learning_rate=1e-3, max_grad_norm=0.05,
    )
    trainer = Trainer(tiny("llama"), args=args, train_dataset=data, callbacks=[mama])
    trainer.train()
    rank = int(os.environ.get("RANK", 0))
    statistics = {name: value.double().sum().item() for name, value in mama.trajectory.values["sensitivity"].items()}
    result = {
        "engine": type(trainer.model_wrapped).__name__,
        "world": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "digest": mama.masks.digest(),
        "violations": mama.masks.verify(trainer.model),
        "sparsity": mama.sparsity,
        "weights": sum(p.double().abs().sum().item() for p in trainer.model.parameters()),
        "statistics": statistics,
    }
    with open(f"{folder}/rank{rank}.json", "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    os.makedirs(sys.argv[1], exist_ok=True)
    main(sys.argv[1], int(sys.argv[2]))
