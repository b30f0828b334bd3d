"""What is written where: checks of output folders before any compute, and files that are whole or not there."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Optional

from safetensors import SafetensorError

from .errors import MamaError, first_line
from .paths import check_paths, exists, is_dir, is_file

__all__ = [
    "WEIGHT_FILES", "check_links", "check_output_dir", "check_output_file", "exists", "holds_something", "is_dir",
    "is_file", "remove_model_files", "write_atomically", "write_bytes", "write_folder", "write_json", "write_text",
]

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
LOCK = ".mama.lock"  # see lock.py
OUR_FOLDERS = ("mama", ".progress", "checkpoint-*")
# What `save_pretrained` and this package write, as they name it; other people's files are none of these.
_MODEL_FILES = re.compile(
    r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)
_MASK_FILES = re.compile(r"(masks|statistics|inputs)(-\d+-of-\d+)?\.safetensors|state\.json")
_WRITING = ".writing.tmp"  # a folder whose files go to their places when all are whole
_LONGEST = 200  # bytes of a file's name, which the temporary one beside it is longer than


def holds_something(path: Path) -> bool:
    return is_dir(path) and any(entry.name != LOCK for entry in path.iterdir())


def check_output_dir(
    path: str | Path, overwrite: bool = False, inputs: Any = None, beside: Iterable[str] = ()
) -> Path:
    """The folder a command may write into; nothing in it is deleted here.

    Args:
        overwrite: whether it may hold something.
        inputs: what the command reads, by what it is; one name is the model's. See `check_paths`, also for `beside`.

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
    except OSError as error:
        raise MamaError(f"{path} cannot be read: {first_line(error)}.") from None
    _check_writable(path)
    return path


def check_output_file(path: Optional[str | Path], inputs: Any = None) -> None:
    """Raises `MamaError` if a result could not be written to `path` at the end, or would replace an input."""
    if path is None:
        return
    path = _checked_name(path)
    if is_dir(path):
        raise MamaError(f"{path} is a folder: give the name of a file.")
    if not is_dir(path.absolute().parent):
        raise MamaError(f"the folder of {path} does not exist: create it first.")
    if path.is_symlink():
        raise MamaError(f"{path} is a link, and files are not written through links: give the file's own name.")
    check_paths([path], _by_what(inputs))
    _check_writable(path.absolute().parent)


def _by_what(inputs: Any) -> Mapping[str, Any]:
    return inputs if isinstance(inputs, Mapping) else {"the model": inputs}


def check_links(folder: Path, names: Iterable[str] = OUR_FOLDERS) -> None:
    """Raises `MamaError` if something in an output folder is a link, through which another file would be changed.

    A link to a folder within it is harmless (`latest -> checkpoint-100`), unless it has one of `names`: shell patterns
    of folders that are written into, and so looked into here.
    """
    if not is_dir(folder):
        return
    inside = folder.resolve()
    ours = [sub for pattern in names for sub in folder.glob(pattern)]
    for place in (folder, *(sub for sub in ours if sub.is_dir())):
        for entry in place.iterdir():
            if entry.is_symlink() and (entry in ours or not entry.is_dir() or inside not in entry.resolve().parents):
                raise MamaError(f"{entry} is a link, and nothing is written through links: move it out of there.")


def _checked_name(path: str | Path) -> Path:
    if not str(path).strip():
        raise MamaError("the name of an output is empty: give a folder or a file.")
    path = Path(path).expanduser()
    try:
        sizes = [len(os.fsencode(part)) for part in path.parts] or [0]
    except UnicodeEncodeError:
        raise MamaError(f"{path} is a name that no file can have: use other characters.") from None
    if max(sizes) > 255 or sizes[-1] > _LONGEST or sum(sizes) > 3000:
        raise MamaError(f"{path} is too long a name: use at most {_LONGEST} characters.")
    return path


def _check_writable(path: Path) -> None:
    there = path.absolute()
    while not exists(there):
        there = there.parent
    if not is_dir(there):
        raise MamaError(f"{path} cannot be created, since {there} is a file: choose another name.")
    if not os.access(there, os.W_OK):
        raise MamaError(f"{path} cannot be written: choose a folder that belongs to you.")


def remove_model_files(folder: Path) -> None:
    """Removes an earlier model's weights and masks, so that stale shards never lie beside the new ones."""
    for place, ours in ((folder, _MODEL_FILES), (folder / "mama", _MASK_FILES)):
        for entry in list(os.scandir(place)) if is_dir(place) and not place.is_symlink() else ():
            if ours.fullmatch(entry.name) and not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary)` and renames: a kill or a full disk never leaves half a file at `path`.

    A link at `path` is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the contents
        os.replace(temporary, path)
        _flush(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise MamaError(
            f"cannot write {path}: {first_line(error)}; free some space or choose another output folder."
        ) from error
    finally:
        try:
            temporary.unlink(missing_ok=True)
        except OSError:
            pass  # what went wrong has been said


def write_folder(folder: Path, write: Callable[[Path], None], before: Callable[[Path], None]) -> None:
    """Calls `write(temporary folder)`, then `before(folder)`, and moves what was written into `folder`.

    A full disk, or a kill while it is written, leaves what `folder` held before; a link in the place of a file is
    replaced, not followed. One run at a time may do this (see lock.py). Raises `MamaError` where it cannot be written.
    """
    temporary = folder / _WRITING
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed run has left
        temporary.mkdir(parents=True)
        write(temporary)
        before(folder)
        for place, _, names in os.walk(temporary):
            there = folder / Path(place).relative_to(temporary)
            there.mkdir(exist_ok=True)
            for name in names:
                os.replace(Path(place) / name, there / name)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        raise MamaError(
            f"cannot write into {folder}: {first_line(error)}; free some space or choose another output folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Sees to it that a renamed file keeps its name when the power fails."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # not every file system can do this to a folder
    finally:
        os.close(handle)


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file (UTF-8) that is whole or not there."""
    write_atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: str | Path, data: bytes) -> None:
    """Writes a file that is whole or not there."""
    write_atomically(Path(path), lambda temporary: temporary.write_bytes(data))


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON into a file that is whole or not there."""
    write_text(path, json.dumps(value, indent=1) + "\n")
