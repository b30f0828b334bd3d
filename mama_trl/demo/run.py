"""The folder of one run and what its stages share."""

import time
from pathlib import Path
from typing import Callable, Optional

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..disk.removal import remove_written
from ..evaluation.perplexity import perplexity
from ..evaluation.tasks import task_accuracy
from ..masks.tensors import read_tensors
from . import arithmetic
from .names import RUN_NAMES, STAGE_FILE
from .recipe import STAGES, RunConfig
from .sections import arguments, check_section
from .stage_file import read_stage, write_stage


class Run:
    """The folder of one run and what its stages share."""

    def __init__(self, config: RunConfig):
        self.config = config
        self.folder = Path(config.output_dir)
        self.cuda = torch.cuda.is_available()
        self._finished: dict[str, dict] = {}

    @property
    def device(self) -> str:
        return "cuda" if self.cuda else "cpu"

    # ---- finished stages

    def path(self, stage: str) -> Path:
        return self.folder / ("model" if stage == "distill" else stage)

    def finished(self, stage: str) -> Optional[dict]:
        """What a stage found out; None if it has not come to its end, or if what it left is damaged."""
        if stage not in self._finished:
            found = read_stage(self.path(stage), stage)
            if found is None:
                return None
            self._finished[stage] = found
        return self._finished[stage]

    def perform(self, stage: str, work: Callable[[], dict]) -> dict:
        """Runs `work`; its result, with seconds and a list of the files it left, goes to stage.json last of all."""
        for later in STAGES[STAGES.index(stage) : -1]:  # what rests on this stage is to be done again as well
            (self.path(later) / STAGE_FILE).unlink(missing_ok=True)
            self._finished.pop(later, None)
        remove_written(self.path(stage), RUN_NAMES[self.path(stage).name])
        self.path(stage).mkdir(parents=True, exist_ok=True)
        set_seed(self.config.seed)
        began = time.perf_counter()
        facts = work()
        facts = {"name": stage, "seconds": round(time.perf_counter() - began, 1), **facts}
        self._finished[stage] = write_stage(self.path(stage), facts)
        return facts

    # ---- what stages share

    def tokenizer(self):
        return AutoTokenizer.from_pretrained(self.path("data"), trust_remote_code=False)

    def rows(self) -> dict[str, torch.Tensor]:
        """Token ids and labels by kind, as the stage `data` has cut them."""
        return read_tensors(self.path("data") / "rows.safetensors", "data file", "delete its folder and call again")

    def sums(self) -> arithmetic.Sums:
        return arithmetic.sums(self.config.data.operands_from, self.config.data.operands_below, self.config.seed)

    def calibration(self) -> torch.Tensor:
        rows = self.rows()
        half = self.config.data.calibration_blocks // 2
        return torch.cat([rows["calibration_text"][:half], rows["calibration_task"][:half]])

    def load(self, stage: str):
        model = AutoModelForCausalLM.from_pretrained(
            self.path(stage), dtype=torch.float32, trust_remote_code=False
        )
        return model.to(self.device)

    def arguments(self, stage: str, given: dict, **defaults):
        """The trainer's configuration of a stage. Raises `MamaError`."""
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
        kind = "distill" if stage == "baselines" else stage
        return arguments(kind, check_section(kind, given), **{**common, **defaults})

    def evaluate(self, model) -> dict:
        """Perplexity on held-out text and accuracy on held-out operands."""
        tokenizer, pairs = self.tokenizer(), self.sums().heldout
        measured = perplexity(model, self.rows()["heldout"])
        accuracy = task_accuracy(
            model, tokenizer, [p for p, _ in pairs], [a for _, a in pairs], arithmetic.correct
        )
        return {"perplexity": measured["perplexity"], "accuracy": accuracy["accuracy"]}
