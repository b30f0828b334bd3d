"""The formats in which a pruned model leaves the house, by name."""

import os
import shutil
from pathlib import Path
from typing import Callable

from safetensors import SafetensorError
from torch import nn

from ..config import check_choice
from ..disk.folders import check_output_dir
from ..errors import MamaError
from ..masks.maskset import MaskSet
from .packed import save_packed

PACKED = "packed.safetensors"


def write_dense(model: nn.Module, masks: MaskSet, folder: Path) -> None:
    """An ordinary checkpoint with zeros, and the masks in `mama/`."""
    model.save_pretrained(folder)
    masks.save(folder)


def write_packed(model: nn.Module, masks: MaskSet, folder: Path) -> None:
    """The config, and one file with the kept values and bit masks: see packed.py."""
    model.config.save_pretrained(folder)
    save_packed(model, masks, folder / PACKED)


# By name: writes a model whose pruned connections are zero into a folder that exists and is empty.
FORMATS: dict[str, Callable[[nn.Module, MaskSet, Path], None]] = {"dense": write_dense, "packed": write_packed}


def export(model: nn.Module, masks: MaskSet, folder: str | Path, format: str) -> Path:
    """Writes a pruned model into `folder` in one of `FORMATS`; a kill or an error leaves no half of it there.

    Raises:
        MamaError: an unknown format, a folder that holds something, pruned connections that are not zero (a format
            that leaves them out would lose them), or a disk that is full.
    """
    write = FORMATS[check_choice(format, tuple(FORMATS), "format")]
    folder = check_output_dir(folder)
    if masks.verify(model):
        raise MamaError("pruned connections are not zero, so an export would lose them: apply the masks first.")
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(model, masks, temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())  # the folder's name must not reach the disk before its contents
        os.replace(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise MamaError(f"cannot write {folder}: {error}; free some space or choose another folder.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
