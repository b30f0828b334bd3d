"""Trains a deep, narrow model for one step on one engine, then measures what one mask update adds to this process's
memory. Started by launch.py."""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import tests.distributed.train_worker  # noqa: F401 (makes FSDP real on a CPU, before the Trainer is made)
from benchmarks.common import PeakMemory
from mama_trl import MamaCallback, MamaConfig
from mama_trl.pruning.prune import prune
from mama_trl.pruning.update import Update, update_masks
from tests.conftest import tiny

SHAPE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}


def main(options: dict) -> None:
    folder, rank = Path(options["folder"]), int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**SHAPE, num_hidden_layers=options["blocks"], vocab_size=384, tie_word_embeddings=True)
    )
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    rows = torch.randint(2, 384, (4, 32), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")
    mama = MamaCallback(MamaConfig(sparsity=0.0))
    args = TrainingArguments(
        output_dir=str(folder), report_to=[], disable_tqdm=True, max_steps=1, per_device_train_batch_size=2,
        save_strategy="no", use_cpu=os.environ["MAMA_TEST_ENGINE"] in ("single", "ddp"), ddp_backend="gloo",
    )
    trainer = Trainer(model, args=args, train_dataset=data, callbacks=[mama])
    trainer.train()
    config = MamaConfig(sparsity=0.8, budget="uniform", redistribution="least_squares", indicators=["activation"])
    own = rows[rank * 2 : rank * 2 + 2]
    update = Update(mama.run.model, mama.run.targets, mama.run.shards, config, mama.trajectory, trainer.optimizer, own)
    prune(tiny("llama"), rows, progress=False)  # what libraries load and allocate at their first call is not ours
    with torch.no_grad(), PeakMemory() as memory:
        masks = update_masks(update, 0.8)
    result = {
        "engine": mama.run.engine, "extra": memory.extra, "model": size, "block": block, "violations": masks.verify(),
        "widest": 4 * SHAPE["intermediate_size"] * (SHAPE["intermediate_size"] + SHAPE["hidden_size"]),
        "masks": sum(bits.numel() for bits in masks.bits.values()),
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
