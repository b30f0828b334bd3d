"""Files that are whole or not there: a kill, a full disk or a failing power leaves what was before."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Callable

from safetensors import SafetensorError

from ..errors import MamaError, first_line

WRITING = ".writing.tmp"  # a folder whose files go to their places when all are whole


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary)` and renames: a kill or a full disk never leaves half a file at `path`.

    A link at `path` is replaced, not followed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    created = [folder for folder in path.parents if not folder.exists()]
    try:
        if path.exists() and not path.is_file():
            raise OSError(f"{path.name} is no file")  # a device, whose place the new file would take
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
            for folder in created if not path.exists() else ():
                folder.rmdir()
        except OSError:
            pass  # what went wrong has been said; or something else has come into the folder


def write_folder(folder: Path, write: Callable[[Path], None], before: Callable[[Path], None]) -> None:
    """Calls `write(temporary folder)`, then `before(folder)`, and moves what was written into `folder`.

    A full disk, or a kill while it is written, leaves what `folder` held before; a link in the place of a file is
    replaced, not followed. One run at a time may do this (see lock.py). Raises `MamaError` where it cannot be written.
    """
    temporary = folder / WRITING
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed run has left
        temporary.mkdir(parents=True)
        write(temporary)
        move_into(temporary, folder, before)
    except (OSError, SafetensorError) as error:
        raise MamaError(
            f"cannot write into {folder}: {first_line(error)}; free some space or choose another output folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_into(temporary: Path, folder: Path, before: Callable[[Path], None]) -> None:
    """Calls `before(folder)` and moves the files of `temporary`, which lies in it, to their places."""
    before(folder)
    for place, _, names in os.walk(temporary):
        there = folder / Path(place).relative_to(temporary)
        there.mkdir(exist_ok=True)
        for name in names:
            os.replace(Path(place) / name, there / name)
    _flush(folder)


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
