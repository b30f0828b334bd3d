"""Trains one of TRL's trainers, or a plain one, on short rows of many lengths; leaves what this rank ended with.

Started by launch.py. Masks are calibrated on the batches themselves, of which each rank sees others, in another number
and of other lengths.
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import DistillationConfig, DistillationTrainer, DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import tests.distributed.train_worker as train_worker  # makes FSDP real on a CPU, before a Trainer is made
from mama_trl import (
    MamaCallback,
    MamaConfig,
    MamaDistillationConfig,
    MamaDistillationTrainer,
    MamaGRPOConfig,
    MamaGRPOTrainer,
)
from mama_trl.engines import ranks
from tests.peers import made

RAGGED = [5, 23, 9, 1, 14, 30, 2, 17, 11, 1, 26, 8]  # a row of one token teaches nothing, and is left out


def rewards(completions, **kwargs):
    return [float(len(str(each)) % 3) for each in completions]


def ragged_rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 250, (RAGGED[i % 12],), generator=generator).tolist() for i in range(96)]


def padded(rows: list[dict]) -> dict:
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids = list(row["input_ids"])
        pads = longest - len(ids)
        batch["input_ids"].append(ids + [0] * pads)
        batch["attention_mask"].append([1] * len(ids) + [0] * pads)
        batch["labels"].append(ids + [-100] * pads)
    return {name: torch.tensor(values) for name, values in batch.items()}


def build(kind: str, folder: Path, config: dict, arguments: dict):
    """The trainer, and its callback."""
    settings = {"sparsity": 0.8, "mask_start": 2, **config}
    tokenizer = made.tokenizer()
    if kind == "plain":
        mama = MamaCallback(MamaConfig(**settings))
        data = Dataset.from_dict({"input_ids": ragged_rows()})
        args = TrainingArguments(**arguments)
        return Trainer(made.model(), args, padded, train_dataset=data, callbacks=[mama]), mama
    arguments = {"gradient_checkpointing": False, "bf16": False, **arguments}
    if kind == "grpo":
        args = MamaGRPOConfig(num_generations=4, max_completion_length=6, **settings, **arguments)
        trainer = MamaGRPOTrainer(made.model(), rewards, args, made.dataset("prompts"), processing_class=tokenizer)
        return trainer, trainer.mama
    if kind == "distill":
        settings["mask_schedule"] = "oneshot"
        args = MamaDistillationConfig(**settings, **arguments)
        trainer = MamaDistillationTrainer(
            made.model(), args, teacher_model=made.model(1), train_dataset=made.dataset("prompt-completion"),
            processing_class=tokenizer,
        )
        return trainer, trainer.mama
    mama = MamaCallback(MamaConfig(**settings))
    common = {"processing_class": tokenizer, "callbacks": [mama]}
    if kind == "dpo":
        args = DPOConfig(**arguments)
        model = type(made.model()).from_pretrained(folder / "policy")
        return DPOTrainer(model, args=args, train_dataset=made.dataset("preference"), **common), mama
    if kind == "trl distill":
        args = DistillationConfig(max_completion_length=6, **arguments)
        return DistillationTrainer(made.model(), made.model(1), args, made.dataset("prompts"), **common), mama
    packing = {"packing": True, "max_length": 48, "num_train_epochs": 20} if kind == "packed" else {}
    args = SFTConfig(**packing, **arguments)
    return SFTTrainer(made.model(), args, train_dataset=made.dataset("text"), **common), mama


def main(options: dict) -> None:
    folder, rank, engine = Path(options["folder"]), int(os.environ.get("RANK", 0)), os.environ["MAMA_TEST_ENGINE"]
    world = train_worker.world()
    trainer, mama = build(options["kind"], folder, options.get("config", {}), {
        "output_dir": str(folder), "use_cpu": engine in ("single", "ddp"), "report_to": [], "disable_tqdm": True,
        "ddp_backend": "gloo" if world > 1 else None, "max_steps": 4, "per_device_train_batch_size": 8 // world,
        "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-3, "seed": 0, **options.get("args", {}),
    })
    watch = train_worker.Watch(mama, {})
    trainer.add_callback(watch)
    trainer.train()
    sequences = mama.run.inputs.sequences()
    trainer.save_model(str(folder / "out"))
    result = {
        "engine": mama.run.engine, "world": world, "sparsity": mama.sparsity, "violations": watch.violations,
        "checked": watch.checked, "digest": mama.masks.digest(), "lengths": sorted(map(len, sequences)),
        "flags": {name: mama.masks.whole(name).int().flatten().tolist() for name in mama.masks.names},
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
    }
    ranks.wait(ranks.everyone())
    (folder / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
