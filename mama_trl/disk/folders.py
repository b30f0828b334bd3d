"""Checks of output folders and files, before any compute: what may be written where."""

import fnmatch
import os
from pathlib import Path
from typing import Any, Iterable, Mapping, Optional

from ..errors import MamaError, first_line
from .paths import check_paths, exists, expanded, is_dir, is_file
from .writing import WRITING

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
LOCK = ".mama.lock"  # see lock.py
OUR_FOLDERS = ("mama", ".progress", "checkpoint-*")
_LONGEST = 200  # bytes of a file's name, which the temporary one beside it is longer than


def holds_something(path: Path) -> bool:
    return is_dir(path) and any(entry.name != LOCK for entry in path.iterdir())


def check_output_dir(
    path: str | Path, overwrite: bool = False, inputs: Any = None, beside: Iterable[str] = (), files: Iterable[str] = ()
) -> Path:
    """The folder a command may write into; nothing in it is deleted here.

    Args:
        overwrite: whether it may hold something.
        inputs: what the command reads, by what it is; one name is the model's. See `check_paths`, also for `beside`.
        files: names (shell patterns) of files that will be written into it.

    Raises:
        MamaError: it is a file, holds something (without `overwrite`) or a link, cannot be written, or something that
            is read would be written over.
    """
    path = _checked_name(path)
    if exists(path) and not is_dir(path):
        raise MamaError(f"{path} is a file: give a folder to write into.")
    try:
        held = holds_something(path)
        if held and not overwrite:
            raise MamaError(
                f"{path} already holds something: give an empty folder, or --overwrite to replace files in it."
            )
        check_paths([path], _by_what(inputs), beside)
        check_links(path)
        _check_places(path, files)
    except OSError as error:
        raise MamaError(f"{path} cannot be read: {first_line(error)}.") from None
    _check_writable(path)
    return path


def check_output_file(path: Optional[str | Path], inputs: Any = None) -> Optional[Path]:
    """The file to write a result into. Raises `MamaError` if that could not be done at the end, or would replace an
    input."""
    if path is None:
        return None
    path = _checked_name(path)
    if is_dir(path):
        raise MamaError(f"{path} is a folder: give the name of a file.")
    if not is_dir(path.absolute().parent):
        raise MamaError(f"the folder of {path} does not exist: create it first.")
    if path.is_symlink():
        raise MamaError(f"{path} is a link, and files are not written through links: give the file's own name.")
    if exists(path) and not is_file(path):
        raise MamaError(f"{path} is a device, which a file would take the place of: give the name of a file.")
    check_paths([path], _by_what(inputs))
    _check_writable(path.absolute().parent)
    return path


def _by_what(inputs: Any) -> Mapping[str, Any]:
    return inputs if isinstance(inputs, Mapping) else {"the model": inputs}


def check_links(folder: Path, names: Iterable[str] = OUR_FOLDERS) -> None:
    """Raises `MamaError` if something in an output folder is a link, soft or hard, through which a file elsewhere would
    be changed.

    A link to a folder within it is harmless (`latest -> checkpoint-100`), unless it has one of `names`: shell patterns
    of folders that are written into, and so looked into here.
    """
    if not is_dir(folder):
        return
    inside = folder.resolve()
    ours = [sub for pattern in names for sub in folder.glob(pattern)]
    for place in (folder, *(sub for sub in ours if sub.is_dir())):
        for entry in place.iterdir():
            within = entry.is_dir() and inside in entry.resolve().parents and entry not in ours
            if entry.is_symlink() and not within or entry.is_file() and entry.stat().st_nlink > 1:
                raise MamaError(f"{entry} is a link, and nothing is written through links: move it out of there.")


def _checked_name(path: str | Path) -> Path:
    if not str(path).strip():
        raise MamaError("the name of an output is empty: give a folder or a file.")
    path = expanded(path)
    try:
        sizes = [len(os.fsencode(part)) for part in path.parts] or [0]
    except UnicodeEncodeError:
        raise MamaError(f"{path} is a name that no file can have: use other characters.") from None
    if max(sizes) > 255 or sizes[-1] > _LONGEST or sum(sizes) > 3000:
        raise MamaError(f"{path} is too long a name: use at most {_LONGEST} characters.")
    return path


def _check_places(folder: Path, files: Iterable[str]) -> None:
    """Raises `MamaError` if a folder stands where a file will be written, or an adapter beside a new model."""
    for entry in folder.iterdir() if is_dir(folder) else ():
        if entry.name == WRITING and is_dir(entry) and not entry.is_symlink():
            continue  # what a killed command has left: it is deleted before anything is written
        if not entry.is_file() and any(fnmatch.fnmatchcase(entry.name, name) for name in files):
            raise MamaError(f"{entry} is no file, and one of this name will be written: move it out of there.")
        if entry.name == "adapter_config.json" and files:
            raise MamaError(f"{entry} is an adapter's, which would be put on the new model: choose another folder.")


def _check_writable(path: Path) -> None:
    there = path.absolute()
    while not exists(there):
        there = there.parent
    if not is_dir(there):
        raise MamaError(f"{path} cannot be created, since {there} is a file: choose another name.")
    if not os.access(there, os.W_OK):
        raise MamaError(f"{path} cannot be written: choose a folder that belongs to you.")
