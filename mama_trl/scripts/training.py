"""What the four training commands share: checks before the run, and the run itself."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Optional

from transformers import TrainerCallback

from ..engines import ranks
from ..errors import MamaError
from ..evaluation.loading import check_model_source
from ..folders import check_output_dir
from ..masks.files import FOLDER, STATE_FILE
from ..training.callback import MamaCallback
from ..training.checkpoints import checkpoints, choose, remove_ours
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
    asked = training_args.resume_from_checkpoint
    asked = {"true": True, "false": None}.get(str(asked).lower(), asked)
    output = Path(training_args.output_dir)
    resume = ranks.decided(lambda: choose(output, asked))
    _check_ranks(resume, training_args)
    if resume is None:
        ranks.decided(lambda: _check_output(output, script_args.overwrite, asked is True, model_args))
    return resume


def _check_output(output: Path, overwrite: bool, again: bool, model_args) -> None:
    # Asked to go on where nothing whole was left: what the first save left half-written is in nobody's way.
    if checkpoints(output) and not overwrite and not again:
        raise MamaError(
            f"`output_dir` is {output}, which holds an earlier run: go on with --resume_from_checkpoint true, start "
            "anew with --overwrite true, or choose another."
        )
    check_output_dir(output, overwrite or again, model_args.model_name_or_path)


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


class StartsAnew(TrainerCallback):
    """Deletes the checkpoints of the run that is overwritten, when everything else about the new one is in order."""

    def on_train_begin(self, args, state, control, **kwargs):
        ranks.decided(lambda: remove_ours(args.output_dir))


def train(trainer, resume, dataset_name: Optional[str], overwrite: bool = False) -> None:
    """Trains, saves model, tokenizer and masks into `output_dir`, and pushes them if asked to.

    Args:
        resume: the checkpoint to go on from, or None.
        overwrite: whether a run that starts anew deletes the checkpoints of an earlier one.

    Raises:
        MamaError: weights are NaN, and then nothing is saved; or, with the model saved, it is not as sparse as asked.
    """
    connect(trainer)
    if resume is None and overwrite:
        trainer.add_callback(StartsAnew())
    trainer.train(resume_from_checkpoint=resume)
    args = trainer.args
    trainer.save_model(args.output_dir)
    if trainer.is_world_process_zero():
        print(f"model saved in {args.output_dir}", file=sys.stderr)
    ours = next(each for each in trainer.callback_handler.callbacks if isinstance(each, MamaCallback))
    if args.push_to_hub and ours.missed is None:
        trainer.push_to_hub(dataset_name=dataset_name)
    trainer.end()
    if ours.missed is not None:
        raise MamaError(ours.missed)
