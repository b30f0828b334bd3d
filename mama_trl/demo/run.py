"""The folder of one run and what its stages share."""

import json
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Callable, Optional

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..errors import MamaError
from ..evaluation.perplexity import perplexity
from ..evaluation.tasks import task_accuracy
from ..folders import write_atomically
from . import arithmetic
from .recipe import RunConfig


class Run:
    """The folder of one run and what its stages share."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = Path(config.output_dir)
        self.cuda = torch.cuda.is_available()

    # ---- finished stages

    def path(self, stage: str) -> Path:
        return self.folder / ("model" if stage == "distill" else stage)

    def finished(self, stage: str) -> Optional[dict]:
        path = self.path(stage) / "stage.json"
        return json.loads(path.read_text()) if path.exists() else None

    def perform(self, stage: str, work: Callable[[], dict]) -> dict:
        """Runs `work` unless the stage is done; its result, with seconds, goes to stage.json last of all."""
        done = self.finished(stage)
        if done is not None:
            return done
        shutil.rmtree(self.path(stage), ignore_errors=True)
        self.path(stage).mkdir(parents=True)
        set_seed(self.config.seed)
        began = time.perf_counter()
        facts = work()
        facts = {"name": stage, "seconds": round(time.perf_counter() - began, 1), **facts}
        path = self.path(stage) / "stage.json"
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(facts)))
        return facts

    # ---- what stages share

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.path("data"))

    def rows(self) -> dict[str, torch.Tensor]:
        return load_file(self.path("data") / "rows.safetensors")

    def sums(self) -> arithmetic.Sums:
        return arithmetic.sums(self.config.data.operands_from, self.config.data.operands_below, self.config.seed)

    def calibration(self) -> torch.Tensor:
        rows = self.rows()
        half = self.config.data.calibration_blocks // 2
        return torch.cat([rows["calibration_text"][:half], rows["calibration_task"][:half]])

    def load(self, stage: str):
        model = AutoModelForCausalLM.from_pretrained(self.path(stage), dtype=torch.float32)
        return model.cuda() if self.cuda else model

    def arguments(self, cls, stage: str, given: dict, **defaults):
        common = {
            "output_dir": str(self.path(stage)),
            "seed": self.config.seed,
            "use_cpu": not self.cuda,
            "bf16": False,
            "gradient_checkpointing": False,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 10,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
        }
        known = {f.name for f in fields(cls)}
        for key in given:
            if key not in known:
                raise MamaError(f"section {stage} has the unknown key {key!r}: it takes the fields of {cls.__name__}.")
        return cls(**{**{k: v for k, v in common.items() if k in known}, **defaults, **given})

    def evaluate(self, model) -> dict:
        """Perplexity on held-out text and accuracy on held-out operands."""
        tokenizer, pairs = self.tokenizer(), self.sums().heldout
        measured = perplexity(model, self.rows()["heldout"])
        accuracy = task_accuracy(
            model, tokenizer, [p for p, _ in pairs], [a for _, a in pairs], arithmetic.correct
        )
        return {"perplexity": measured["perplexity"], "accuracy": accuracy["accuracy"]}
