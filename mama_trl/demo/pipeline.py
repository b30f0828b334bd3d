"""`mama run`: text and task, pre-training, SFT, GRPO with pruning, distillation, baselines, report.

Every stage leaves a folder and, last of all, `stage.json` in it: a killed run goes on after the last stage that
finished. All stages share one seed, one tokenizer, one evaluation and one set of calibration tokens.
"""

import os
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from ..disk.lock import locked
from .claim import check_folder, claim
from .facts import report_of
from .recipe import STAGES, RunConfig
from .run import Run
from .sections import check_masks, check_rows, check_shape
from .stages import baselines, data, distill, distill_arguments, grpo, grpo_arguments, pretrain, sft, sft_arguments


def run_pipeline(config_path: str | Path, overwrite: bool = False, **overrides) -> Path:
    """Runs or goes on with a recipe; returns the path of report.html.

    Raises:
        MamaError: the recipe makes no sense, the output folder holds something else (or, without `overwrite`, a run of
            other settings), or another process is at work in it. Nothing is changed then.
    """
    run = Run(RunConfig.read(config_path, **overrides))
    check_arguments(run)
    check_folder(run.config, config_path, overwrite)
    with locked(run.folder):
        claim(run.config, overwrite)
        return _stages(run)


def _stages(run: Run) -> Path:
    """Every stage that is not finished, and the report."""
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
    pruning = {"grpo": grpo_arguments(run), "distill": distill_arguments(run, "distill")}
    model = check_shape(run.config.shape(), run.config.data.vocab_size)
    for stage, config in pruning.items():
        check_masks(stage, config, run.config.sparsity, model)
    for stage in ("pretrain", "sft", "distill"):
        check_rows(stage, getattr(run.config, stage), run.config.data.sequence_length)
