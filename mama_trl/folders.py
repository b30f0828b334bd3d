"""What is written where: checks of output folders before any compute, and files that are whole or not there."""

import os
from pathlib import Path
from typing import Optional

from safetensors import SafetensorError

from .errors import MamaError

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def holds_something(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def check_output_dir(path: str | Path, overwrite: bool = False, model: Optional[str] = None) -> Path:
    """The folder a command may write into; nothing in it is deleted here.

    Raises:
        MamaError: it is a file, holds something (without `overwrite`), cannot be written, or is the model's own.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise MamaError(f"{path} is a file: give a folder to write into.")
    if model is not None and Path(model).is_dir() and path.resolve() == Path(model).resolve():
        raise MamaError(f"{path} is the model's own folder, which would be lost: give another output folder.")
    if holds_something(path) and not overwrite:
        raise MamaError(f"{path} already holds something: give an empty folder, or --overwrite to replace files in it.")
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        raise MamaError(f"{path} cannot be written: choose a folder that belongs to you.")
    return path


def check_output_file(path: Optional[str]) -> None:
    """Raises `MamaError` if a result could not be written to `path` at the end."""
    if path is not None and Path(path).is_dir():
        raise MamaError(f"{path} is a folder: give the name of a file.")
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise MamaError(f"the folder of {path} does not exist: create it first.")


def remove_model_files(folder: Path) -> None:
    """Removes an earlier model's weights and masks, so that stale shards never lie beside the new ones."""
    for pattern in (*WEIGHT_FILES, "*.index.json", "mama/*.safetensors", "mama/*.json"):
        for path in folder.glob(pattern):
            path.unlink()


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary)` and renames: a kill or a full disk never leaves half a file at `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the name must not reach the disk before the contents
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as an error of its own
        raise MamaError(f"cannot write {path}: {error}; free some space or choose another output_dir.") from error
    finally:
        temporary.unlink(missing_ok=True)
