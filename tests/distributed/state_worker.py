"""One phase of a run on one engine: trains, is resumed, holds or prunes what was saved, or meets a NaN."""

import json
import logging
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from mama_trl import MamaCallback, MamaConfig, MamaError
from mama_trl.engines import ranks
from mama_trl.engines.detect import shards_of
from tests.conftest import tiny
from tests.distributed import train_worker  # with the shim that makes FSDP2 real on a CPU

SAID: list[str] = []


class Listen(logging.Handler):
    def emit(self, record):
        SAID.append(record.getMessage())


class Spoil(TrainerCallback):
    """A NaN in what one rank owns of a weight that no mask touches."""

    mama: MamaCallback

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            for shard in shards_of(self.mama.run.model.named_parameters()):
                if "norm" in shard.name and shard.length and ranks.rank(ranks.everyone()) == 1:
                    shard.master[0] = float("nan")
                    break


def main(options: dict) -> None:
    logging.getLogger("mama_trl").addHandler(Listen())
    folder, phase = Path(options["folder"]), options["phase"]
    rows = torch.randint(2, 384, (96, 24), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")
    config = dict(sparsity=0.75, mask_start=2, indicators=["magnitude"], redistribution="none", budget="uniform")
    if phase == "hold":
        config = dict(mask_schedule="hold")
    elif phase == "choice":
        config |= dict(sparsity=0.85, exclude_modules=["mlp"])
    mama = MamaCallback(MamaConfig(**config))
    world = train_worker.world()
    args = TrainingArguments(
        output_dir=str(folder / {"hold": "held", "choice": "chosen"}.get(phase, "run")),
        use_cpu=train_worker.ENGINE in ("single", "ddp"), report_to=[], disable_tqdm=True, seed=0,
        ddp_backend="gloo" if world > 1 else None, max_steps=4, per_device_train_batch_size=8 // world,
        learning_rate=1e-3, save_strategy="steps", save_steps=2, logging_steps=1, lr_scheduler_type="constant",
    )
    model = LlamaForCausalLM.from_pretrained(options["model"]) if "model" in options else tiny("llama")
    spoil = Spoil()
    spoil.mama = mama
    trainer = Trainer(
        model, args=args, train_dataset=data, callbacks=[mama, *([spoil] if phase == "nan" else [])]
    )
    result = {"rank": int(os.environ.get("RANK", 0))}
    try:
        trainer.train(resume_from_checkpoint=options.get("resume"))
        trainer.save_model(str(folder / options["save"]))
        result |= {
            "engine": mama.run.engine, "sparsity": mama.sparsity, "violations": mama.masks.verify(),
            "digest": mama.masks.digest(), "step": trainer.state.global_step,
        }
    except MamaError as error:
        result["error"] = str(error)
    result["said"] = SAID
    with open(folder / f"rank{result['rank']}.json", "w") as file:
        json.dump(result, file)
    ranks.wait(ranks.everyone())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
