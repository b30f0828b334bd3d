"""Which checkpoints of a run are whole, which one to resume, and which an overwritten run leaves.

A save that is killed leaves a folder that looks like a checkpoint. Every rank writes its files, then, after a barrier,
one of them writes `mama/state.json`, which lists all that resuming reads: a checkpoint is whole when that file is there
and every file is as it says.
"""

import json
import logging
import os
from pathlib import Path
from typing import Optional

from transformers.trainer import TRAINER_STATE_NAME

from ..disk.removal import MODEL_NAMES, Names, remove_written
from ..errors import MamaError
from ..masks.files import FOLDER, STATE_FILE
from ..masks.known import is_checkpoint
from .manifest import changed, read_state

logger = logging.getLogger(__name__)
_OPTIMIZERS = ("optimizer", "global_step", "pytorch_model_fsdp")  # how names begin: the Trainer's, DeepSpeed's, FSDP's
_ENGINES: Names = dict.fromkeys(("*.pt", "*.distcp", ".metadata"))
# What the Trainer, its engines and this package leave in a checkpoint.
_WRITTEN: Names = {
    "global_step*": _ENGINES, "pytorch_model_fsdp_[0-9]*": _ENGINES, "optimizer_[0-9]*": _ENGINES,
    **dict.fromkeys((
        "config.json", "generation_config.json", "model*.safetensors", "pytorch_model*", "adapter_*", "*.index.json",
        "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*",
        "*processor_config.json", "training_args.bin", "trainer_state.json", "optimizer*", "scheduler.pt", "scaler.pt",
        "rng_state*", "README.md", "latest", "zero_to_fp32.py",
    )),
}


def fault(checkpoint: str | Path, hashes: bool = True) -> Optional[str]:
    """Why this checkpoint cannot be resumed: what is cut off, missing or damaged; None if it is whole.

    Without `hashes` files are not read, only looked at.
    """
    checkpoint = Path(checkpoint)
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return f"its save was cut off before {TRAINER_STATE_NAME}"
    if not (checkpoint / FOLDER / STATE_FILE).is_file():
        cut = "its save was cut off" if is_ours(checkpoint) else "it was written without MamaCallback"
        return f"{cut}: it has no {FOLDER}/{STATE_FILE}"
    state = read_state(checkpoint)
    if state is None or not isinstance(state.get("files"), dict):
        return f"{FOLDER}/{STATE_FILE} is damaged, or of an earlier version"
    if not any(name.startswith(_OPTIMIZERS) for name in state["files"]):
        return "it was saved without its optimizer (`save_only_model`)"
    return changed(checkpoint, state["files"], hashes)


def is_whole(checkpoint: str | Path) -> bool:
    """Whether the save of this checkpoint, by the Trainer and by `MamaCallback`, came to its end, and all is there."""
    return fault(checkpoint) is None


def is_ours(checkpoint: Path) -> bool:
    """Whether a run with `MamaCallback` wrote this folder, or began to."""
    return (checkpoint / FOLDER).is_dir()


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders in `output_dir`, oldest first, whole or not."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir() and is_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def newest_whole(output_dir: str | Path) -> Optional[Path]:
    """The newest checkpoint that can be resumed; None if there is none."""
    return next((path for path in reversed(checkpoints(output_dir)) if is_whole(path)), None)


def cut_off(output_dir: str | Path, hashes: bool = True) -> Optional[str]:
    """A sentence if the newest checkpoint is not whole, and which one to use; else None."""
    found = checkpoints(output_dir)
    # Without any folder of ours the run had no MamaCallback, and nothing is known about its saves.
    if not found or not any(is_ours(path) for path in found):
        return None
    why = fault(found[-1], hashes)
    return why and f"{found[-1]} is not whole ({why}): {_advice(output_dir)}."


def _advice(output_dir: str | Path) -> str:
    whole = newest_whole(output_dir)
    return f"resume from {whole.name}" if whole else "start from the beginning, since no earlier one is whole"


def require_whole(checkpoint: Path, output_dir: str | Path) -> None:
    """Raises `MamaError` if `checkpoint` cannot be resumed."""
    why = fault(checkpoint)
    if why is not None:
        raise MamaError(f"{checkpoint} is not whole ({why}): {_advice(output_dir)}.")


def choose(output_dir: str | Path, asked: Optional[str | bool]) -> Optional[str]:
    """The checkpoint that `resume_from_checkpoint` means; None to start from the beginning.

    Args:
        asked: True for the newest whole one: those that are not are said and passed over. A folder must be whole.

    Raises:
        MamaError: the folder does not exist or is not whole, or all there is was written without `MamaCallback`.
    """
    if not asked:
        return None
    if asked is not True:
        if not Path(asked).is_dir():
            raise MamaError(
                f"`resume_from_checkpoint` is {asked}, which is no folder: give a checkpoint folder, or true."
            )
        require_whole(Path(asked), output_dir)
        return str(asked)
    found = checkpoints(output_dir)
    damaged = None
    for path in reversed(found):
        why = fault(path)
        if why is None:
            return str(path)
        if (path / FOLDER / STATE_FILE).is_file():
            damaged = damaged or f"{path} is not whole ({why})"
        logger.warning("%s is not whole (%s): it is passed over.", path, why)
    if damaged:  # it has been whole: to start anew would write over what may be mended
        raise MamaError(f"{damaged}, and no other checkpoint is: restore it, or start anew with --overwrite true.")
    if found and not any(is_ours(path) for path in found) and (found[-1] / TRAINER_STATE_NAME).is_file():
        raise MamaError(
            f"{found[-1]} was written without MamaCallback, so masks and statistics cannot be resumed: give it as the "
            "model of a new run, or choose another output folder."
        )
    logger.warning("no whole checkpoint in %s: starting from the beginning.", output_dir)
    return None


def let_go_first(output_dir: str | Path) -> None:
    """Makes checkpoints that are not whole the oldest, so that `save_total_limit` deletes them before whole ones."""
    for path in checkpoints(output_dir):
        if is_ours(path) and fault(path, hashes=False) is not None:
            os.utime(path, (0, 0))


def remove_ours(output_dir: str | Path) -> None:
    """Deletes the checkpoints that runs with `MamaCallback` left in a folder: the files that such a run writes, and
    nothing else. Links stay."""
    for path in checkpoints(output_dir):
        if path.is_symlink() or not is_ours(path):
            logger.warning("%s stays, since no run of ours wrote it.", path)
            continue
        (path / FOLDER / STATE_FILE).unlink(missing_ok=True)  # whatever a kill leaves of it is not whole
        # Our own folder goes last, so that what a kill leaves is known as ours.
        remove_written(path, _WRITTEN)
        if remove_written(path, {FOLDER: MODEL_NAMES[FOLDER]}):
            logger.warning("%s keeps what no run wrote.", path)
