"""Where a run's masks and statistics are looked for: the checkpoint that is resumed, or the folder of the model."""

import json
import logging
from pathlib import Path
from typing import Optional

from torch import nn
from transformers.trainer import TRAINER_STATE_NAME

from ..engines import ranks
from ..errors import MamaError
from ..masks.files import FOLDER

logger = logging.getLogger(__name__)


def check_limit(args) -> None:
    """Raises `MamaError` for a limit of one checkpoint: the Trainer deletes the old one before ours is written, so that
    a kill in between would lose both."""
    if args.save_total_limit == 1 and args.save_strategy != "no":
        raise MamaError(
            "`save_total_limit` is 1, so that a run killed while it saves would be left without a whole checkpoint: "
            "set it to 2."
        )


def resumed_from(args, state) -> Path:
    """The folder of the checkpoint that the Trainer has resumed from. Collective.

    The Trainer does not say which: it is the one that the arguments name, or else the one in the output folder, whose
    Trainer state equals the loaded one. Raises `MamaError` if neither is.
    """
    return Path(ranks.decided(lambda: _resumed_from(args, state)))


def _resumed_from(args, state) -> str:
    given = args.resume_from_checkpoint
    ours = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    for folder in [Path(given), ours] if isinstance(given, str) else [ours]:
        try:
            loaded = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            history = json.dumps(loaded["log_history"])
        except (OSError, ValueError, KeyError):
            continue
        if loaded.get("global_step") == state.global_step and history == json.dumps(state.log_history):
            return str(folder)
    raise MamaError(
        f"the checkpoint that is resumed at step {state.global_step} is not {ours}, so its masks and statistics cannot "
        "be found: set `resume_from_checkpoint` in the training arguments to its folder too."
    )


def beside(model: nn.Module) -> Optional[Path]:
    """The folder that the model was loaded from, if masks or statistics lie in it; hub models are looked up."""
    name = getattr(model, "name_or_path", "") or ""
    if not name:
        return None
    if (Path(name) / FOLDER).is_dir():
        return Path(name)
    if Path(name).exists():
        return None
    return _from_hub(name)


def _from_hub(name: str) -> Optional[Path]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[f"{FOLDER}/*"]))
    except Exception as error:  # offline, private, or not a hub name: training goes on, said in the log
        logger.info("no masks looked up on the hub for %s: %s", name, error)
        return None
    return folder if (folder / FOLDER).is_dir() else None


def forget_best(state) -> None:
    """Forgets the best model so far, as `load_best_model_at_end` and early stopping know it: one from before the last
    mask update is not yet as sparse as asked for."""
    state.best_metric = None
    state.best_model_checkpoint = None
    state.best_global_step = None
