"""What the four training commands share: checks before the run, and the run itself."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Optional

from transformers.trainer_utils import get_last_checkpoint

from ..errors import MamaError
from ..evaluation.loading import check_model_source
from ..folders import check_output_dir, holds_something
from ..masks.files import FOLDER, STATE_FILE
from ..training.checkpoints import cut_off, newest_whole
from ..training.integrations import connect

logger = logging.getLogger(__name__)


def check_run(script_args, training_args, model_args, needs_weights: bool = True):
    """Checks before any compute; returns what to resume from (path or None).

    Raises:
        MamaError: no model, a folder without weights, adapters, or an output_dir in use.
    """
    if not model_args.model_name_or_path:
        raise MamaError("`model_name_or_path` is missing: give a model folder or a hub id.")
    check_model_source(model_args.model_name_or_path, needs_weights)
    for name in ("use_peft", "load_in_8bit", "load_in_4bit"):
        if getattr(model_args, name):
            raise MamaError(f"`{name}` is set, which is not supported yet: train the full weights without adapters.")
    resume = training_args.resume_from_checkpoint
    again = str(resume).lower() == "true"
    output = Path(training_args.output_dir)
    if str(resume).lower() == "false":
        resume = None
    if again:
        sentence = cut_off(output)
        resume = newest_whole(output) or (get_last_checkpoint(output) if output.is_dir() and not sentence else None)
        if sentence:
            logger.warning(sentence)
        elif resume is None:
            logger.warning("no checkpoint in %s yet: starting from the beginning", output)
        resume = resume and str(resume)
    elif resume is not None and not Path(resume).is_dir():
        raise MamaError(f"`resume_from_checkpoint` is {resume}, which is no folder: give a checkpoint folder, or true.")
    _check_ranks(resume, training_args)
    if resume is None and int(os.environ.get("RANK", 0)) == 0:
        # Asked to go on where nothing whole was left: what the first save left half-written is in nobody's way.
        if holds_something(output) and get_last_checkpoint(output) and not script_args.overwrite and not again:
            raise MamaError(
                f"`output_dir` is {output}, which holds an earlier run: go on with --resume_from_checkpoint true, "
                "start anew with --overwrite true, or choose another."
            )
        check_output_dir(output, script_args.overwrite or again, model_args.model_name_or_path)
    return resume


def _check_ranks(resume: Optional[str], training_args) -> None:
    """DeepSpeed loads its optimizer only on as many ranks as wrote it: said before any model is loaded."""
    state = Path(resume) / FOLDER / STATE_FILE if resume else None
    if state is None or not state.is_file() or not os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return
    written, here = json.loads(state.read_text(encoding="utf-8")).get("ranks"), int(os.environ.get("WORLD_SIZE", 1))
    if written not in (None, here):
        raise MamaError(
            f"{resume} was written by {written} processes and this run has {here}, where DeepSpeed does not load its "
            f"optimizer: start {written}, or convert it to a universal checkpoint first (see docs/distributed.md)."
        )


def model_options(training_args, model_args) -> dict:
    """What the model is loaded with, also stored as the trainer's `model_init_kwargs`."""
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    training_args.model_init_kwargs = options
    return options


def train(trainer, resume, dataset_name: Optional[str]) -> None:
    """Trains, saves model, tokenizer and masks into `output_dir`, and pushes them if asked to."""
    connect(trainer)
    trainer.train(resume_from_checkpoint=resume)
    args = trainer.args
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    if trainer.is_world_process_zero():
        print(f"model saved in {args.output_dir}", file=sys.stderr)
    trainer.end()
