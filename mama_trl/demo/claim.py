"""Whether a folder may become, or go on being, the folder of a run; and deleting an earlier run from it."""

import json
import logging
from pathlib import Path
from typing import Any, Optional

from ..disk.folders import LOCK, OUR_FOLDERS, check_links, check_output_dir, holds_something
from ..disk.paths import check_not_written
from ..disk.removal import remove_written
from ..disk.writing import write_json
from ..errors import MamaError, first_line
from .names import RUN_FILE, RUN_NAMES, STAGE_FILE
from .recipe import FORMAT, RunConfig

logger = logging.getLogger(__name__)
_A_MODELS = ("config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


def check_folder(config: RunConfig, recipe: str | Path, overwrite: bool) -> None:
    """Raises `MamaError` if the run cannot have its output folder; changes nothing."""
    check_output_dir(config.output_dir, True, {"the recipe": recipe}, beside=("the recipe",))
    folder = Path(config.output_dir)
    here = Path.cwd()
    if folder.resolve() in (here, *here.parents, Path.home().resolve()):
        raise MamaError(f"`output_dir` is {folder}, in which all your work lies: give the run a folder of its own.")
    check_not_written(recipe, RUN_NAMES, folder)
    check_links(folder, (*OUR_FOLDERS, *RUN_NAMES))
    _check_earlier(folder, config, overwrite)


def claim(config: RunConfig, overwrite: bool) -> None:
    """Writes run.json, with `overwrite` after deleting what an earlier run wrote.

    Raises:
        MamaError: the folder holds something else, or a run of other settings that `overwrite` does not give up; or a
            finished stage of the earlier run cannot be deleted, which would pass for this run's.
    """
    folder = Path(config.output_dir)
    earlier = _check_earlier(folder, config, overwrite)
    if earlier is not None and overwrite:
        kept = (LOCK, RUN_FILE)  # which this process holds; which a kill must leave, since by it the folder is ours
        names = {name: inner for name, inner in RUN_NAMES.items() if name not in kept}
        # What was named may be a link to the folder: it is that folder's run which is overwritten.
        stays = [path for path in remove_written(folder.resolve(), names) if path.name not in kept]
        stage = next((path for path in stays if path.name == STAGE_FILE), None)
        if stage is not None:
            raise MamaError(f"{stage} cannot be deleted: delete {folder} yourself, or choose another folder.")
        if stays:
            logger.warning("%s keeps what no run wrote: %s.", folder, ", ".join(path.name for path in stays[:5]))
    write_json(folder / RUN_FILE, config.settings())


def _check_earlier(folder: Path, config: RunConfig, overwrite: bool) -> Optional[dict[str, Any]]:
    """The settings of the run that the folder holds; None if it is empty. Raises `MamaError` if it is not ours."""
    if not holds_something(folder):
        return None
    path = folder / RUN_FILE
    foreign = [name for name in _A_MODELS if (folder / name).exists()]
    if not path.is_file() or foreign:
        what = f"a model ({foreign[0]})" if foreign else "something else than a run"
        raise MamaError(f"`output_dir` {folder} holds {what}, which is never deleted: choose another folder.")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(stored, dict) or str(stored.get("format", FORMAT)) != FORMAT:
            raise ValueError("it is no run's")
        known = {name: value for name, value in stored.items() if name != "format"}
        if overwrite:
            _check_ours(known, path)
    except (OSError, ValueError, RecursionError) as error:
        raise MamaError(
            f"{path} is damaged or of another program ({first_line(error)}): delete {folder} yourself if it is to go, "
            "or choose another folder."
        ) from None
    now = json.loads(json.dumps(config.settings()))
    if not overwrite and any(known.get(name) != now[name] for name in now if name not in ("format", "output_dir")):
        raise MamaError(
            f"`output_dir` {folder} holds a run with other settings: choose another folder, or give --overwrite to "
            "delete that run."
        )
    return known


def _check_ours(settings: dict[str, Any], path: Path) -> None:
    """Raises `ValueError` if run.json does not read like a recipe: earlier versions wrote no format into it."""
    if "output_dir" not in settings or "data" not in settings:
        raise ValueError("it has no output_dir and data")
    RunConfig.of(settings, str(path))
