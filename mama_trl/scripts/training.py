"""What the four training commands share: checks before the run, and the run itself."""

import json
import logging
import os
import shutil
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Iterator, Optional

from transformers import TrainerCallback

from ..config import MamaConfig
from ..disk.folders import check_output_dir, holds_something
from ..disk.lock import locked
from ..disk.paths import check_not_written
from ..disk.removal import MODEL_FILES, remove_weights
from ..disk.writing import WRITING, move_into
from ..engines import ranks
from ..errors import MamaError, first_line, one_line
from ..evaluation.loading import check_model_source, check_tokenizer, load_tokenizer
from ..masks.files import FOLDER, STATE_FILE, files_of
from ..masks.maskset import STEM as MASKS
from ..training.callback import MamaCallback
from ..training.checkpoints import checkpoints, choose, remove_ours
from ..training.integrations import connect
from ..training.settings import check_buildable, check_schedule
from .fits import check_fits_source
from .inputs import inputs_of

logger = logging.getLogger(__name__)


@contextmanager
def claimed(
    config: MamaConfig, script_args, training_args, model_args, dataset_args, needs_weights: bool = True
) -> Iterator[Optional[str]]:
    """Checks before any compute, then holds the output folder for this run; gives what to resume from, path or None.

    Raises:
        MamaError: no model, a folder without weights or with others, adapters, settings that cannot be had, an
            output_dir in use, or one through which something that is read would be changed.
    """
    resume = check_run(config, script_args, training_args, model_args, dataset_args, needs_weights)
    with locked(training_args.output_dir) if _first_rank() else nullcontext():
        yield resume


def check_run(config, script_args, training_args, model_args, dataset_args, needs_weights: bool = True):
    """The checks of `claimed`."""
    source = model_args.model_name_or_path
    if not source:
        raise MamaError("`model_name_or_path` is missing: give a model folder or a hub id.")
    for name in ("use_peft", "load_in_8bit", "load_in_4bit"):
        if getattr(model_args, name):
            raise MamaError(f"`{name}` is set, which is not supported yet: train the full weights without adapters.")
    resume = _resumed(training_args)
    _check_ranks(resume, training_args)
    inputs = inputs_of(script_args, training_args, model_args, dataset_args)
    ranks.decided(lambda: _check_output(script_args, training_args, inputs, resume))
    check_buildable(training_args)
    check_schedule(config, training_args.max_steps)
    check_model_source(source, needs_weights, training_args.trust_remote_code)
    check_fits_source(source, config, training_args.trust_remote_code)
    return resume


def _first_rank() -> bool:
    return int(os.environ.get("RANK", 0)) == 0


def _resumed(training_args) -> Optional[str]:
    """The checkpoint to go on from; None to start at the beginning. Collective.

    Raises `MamaError` if the one that is named is no folder or not whole, or if all there are are damaged.
    """
    asked = training_args.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    return ranks.decided(lambda: choose(training_args.output_dir, True if _again(training_args) else asked))


def _again(training_args) -> bool:
    return str(training_args.resume_from_checkpoint).lower() == "true"


def _check_output(script_args, training_args, inputs: dict[str, Any], resume: Optional[str]) -> None:
    """Raises `MamaError` if the run cannot have its output folder."""
    output, given = Path(training_args.output_dir), training_args.output_dir
    # Asked to go on where nothing whole was left: what the first save left half-written is in nobody's way.
    own = _again(training_args) or resume is not None and output.resolve() in Path(resume).resolve().parents
    if resume is None and not own and not script_args.overwrite and holds_something(output):
        if checkpoints(output):
            raise MamaError(
                f"`output_dir` is {output}, which holds an earlier run: go on with --resume_from_checkpoint true, "
                "start anew with --overwrite true, or choose another."
            )
    rewards = [what for what in inputs if what.startswith("reward ")]
    beside = ["the checkpoint", "the config file", "the engine's config", *rewards]
    if resume is not None and Path(inputs["the model"]).resolve() == Path(resume).resolve():
        beside.append("the model")  # which the checkpoint's weights replace in any case
    inputs["the checkpoint"] = resume
    check_output_dir(given, script_args.overwrite or own, inputs, beside, MODEL_FILES)
    for what in beside[1:]:
        check_not_written(inputs.get(what), MODEL_FILES, given)


def tokenizer_of(training_args, model_args):
    """The model's tokenizer. Raises `MamaError` if it does not belong to the model."""
    tokenizer = load_tokenizer(model_args.model_name_or_path, training_args.trust_remote_code)
    check_tokenizer(tokenizer, model_args.model_name_or_path, training_args.trust_remote_code)
    return tokenizer


def trainer_of(cls: type, *args, **kwargs):
    """A trainer. Raises `MamaError` for what it says against its model, its data or its arguments."""
    try:
        trainer = cls(*args, **kwargs)
        _check_generation(trainer)
        return trainer
    except (MamaError, OSError, MemoryError):
        raise
    except Exception as error:  # what any data make templates, tokenizers and checks say
        logger.debug("%s could not be made", cls.__name__, exc_info=True)
        raise MamaError(f"{cls.__name__} cannot be set up: {first_line(error)}.") from error


def _check_generation(trainer) -> None:
    """Raises `MamaError` for a generation_config.json that could not be saved again with the tokenizer's tokens."""
    config, tokenizer = getattr(trainer.model, "generation_config", None), trainer.processing_class
    names = ("eos_token_id", "bos_token_id", "pad_token_id")
    if config is not None and any(getattr(tokenizer, name, None) != getattr(config, name, None) for name in names):
        try:
            config.validate(strict=True)
        except ValueError as error:
            said = " ".join(str(error).split())
            raise MamaError(f"generation_config.json beside the model is invalid: {one_line(said, 180)}") from error


def _check_ranks(resume: Optional[str], training_args) -> None:
    """DeepSpeed loads its optimizer only on as many ranks as wrote it: said before any model is loaded."""
    state = Path(resume) / FOLDER / STATE_FILE if resume else None
    if state is None or not state.is_file() or not os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return
    try:
        written = json.loads(state.read_text(encoding="utf-8")).get("ranks")
    except (OSError, ValueError, AttributeError):
        return  # which is said when the checkpoint is read
    here = int(os.environ.get("WORLD_SIZE", 1))
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
        "trust_remote_code": training_args.trust_remote_code,
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
    _save(trainer, Path(args.output_dir))
    if trainer.is_world_process_zero():
        print(f"model saved in {args.output_dir}", file=sys.stderr)
    ours = next(each for each in trainer.callback_handler.callbacks if isinstance(each, MamaCallback))
    if args.push_to_hub and ours.missed is None:
        trainer.push_to_hub(dataset_name=dataset_name)
    trainer.end()
    if ours.missed is not None:
        raise MamaError(ours.missed)


def _save(trainer, folder: Path) -> None:
    """Writes model, tokenizer and masks into `folder`, where they appear when they are whole. Collective."""
    temporary = folder / WRITING
    if trainer.args.should_save:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed run has left
    trainer.accelerator.wait_for_everyone()

    def before(folder: Path) -> None:
        remove_weights(folder)
        new = [path.name for path in files_of(temporary / FOLDER, MASKS)]
        for path in files_of(folder / FOLDER, MASKS) if new else ():
            if path.name not in new:  # a part of them, as each rank has written its own
                path.unlink()

    try:
        trainer.save_model(str(temporary), _internal_call=True)
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            move_into(temporary, folder, before)
    finally:
        if trainer.args.should_save:  # the others must not delete what this one moves
            shutil.rmtree(temporary, ignore_errors=True)
