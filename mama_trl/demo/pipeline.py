"""`mama run`: text and task, pre-training, SFT, GRPO with pruning, distillation, baselines, report.

Every stage leaves a folder and, last of all, `stage.json` in it: a killed run goes on after the last stage that
finished. All stages share one seed, one tokenizer, one evaluation and one set of calibration tokens.
"""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from transformers import LlamaConfig
from transformers.utils.logging import disable_progress_bar

from ..errors import MamaError
from ..folders import write_atomically
from .facts import report_of
from .recipe import STAGES, RunConfig
from .run import Run
from .stages import baselines, data, distill, distill_arguments, grpo, grpo_arguments, pretrain, sft, sft_arguments


def run_pipeline(config_path: str | Path, overwrite: bool = False, **overrides) -> Path:
    """Runs or goes on with a recipe; returns the path of report.html.

    Raises `MamaError` if the output folder holds something else and `overwrite` is false.
    """
    config = RunConfig.read(config_path, **overrides)
    run = Run(config)
    _claim(run, overwrite)
    check_arguments(run)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    disable_progress_bar()  # "Loading weights" would interrupt the stages' own bars
    for number, (stage, work) in enumerate(
        [
            ("data", data), ("pretrain", pretrain), ("sft", sft), ("grpo", grpo), ("distill", distill),
            ("baselines", baselines),
        ],
        start=1,
    ):
        label = f"{number}/{len(STAGES)} {stage}"
        if run.finished(stage):
            print(f"{label}: done before")
        else:
            run.perform(stage, lambda: work(run, label))
    print(f"{len(STAGES)}/{len(STAGES)} report")
    return report_of(run)


def check_arguments(run: Run) -> None:
    """Builds every stage's arguments once, so that a mistake shows before any compute is spent."""
    sft_arguments(run, "pretrain")
    sft_arguments(run, "sft")
    grpo_arguments(run)
    distill_arguments(run, "distill")
    LlamaConfig(**run.config.model)


def _claim(run: Run, overwrite: bool) -> None:
    """Writes run.json; refuses a folder with other contents, or with a run of other settings."""
    settings = json.loads(json.dumps(asdict(run.config)))
    path = run.folder / "run.json"
    if overwrite and run.folder.exists():
        shutil.rmtree(run.folder)
    if path.exists():
        if json.loads(path.read_text()) != settings:
            raise MamaError(
                f"`output_dir` {run.folder} holds a run with other settings: choose another folder, or give "
                "--overwrite to delete it."
            )
    elif run.folder.exists() and any(run.folder.iterdir()):
        raise MamaError(
            f"`output_dir` {run.folder} holds something else: choose another folder, or give --overwrite to delete it."
        )
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=1)))
