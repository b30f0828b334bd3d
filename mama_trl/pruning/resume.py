"""Finished blocks of a running `mama prune` on disk, so that a killed run goes on where it was."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from ..calibration.progress import Progress
from ..disk.folders import LOCK
from ..disk.paths import is_dir, is_file
from ..disk.removal import Names, remove_written
from ..disk.writing import WRITING, write_json
from ..engines.offload import readable_parameters
from ..errors import MamaError, shown
from ..masks.bits import bytes_for, pack_bits, unpack_bits
from ..masks.tensors import TensorFile, write_tensors
from ..model.targets import Target

logger = logging.getLogger(__name__)
FOLDER = ".progress"  # inside the output folder, removed at the end
COMMAND = "command.json"
OFFLOADED = "offloaded"  # within FOLDER: changed blocks of a model whose blocks are fetched one at a time
BLOCKS: Names = {"block-*.safetensors": None, "outside.safetensors": None, ".*.tmp": None}
NAMES: Names = {
    **BLOCKS, COMMAND: None, OFFLOADED: {"*.safetensors": None, "*.dat": None, "*.json": None, "*.tmp": None},
}


def fingerprint(model: nn.Module, rows: Tensor) -> str:
    """SHA-256 over the model's parameters (names, shapes, an exact sum of their bits) and the calibration tokens."""
    sha = hashlib.sha256()
    for part in readable_parameters(model):
        for name, parameter in part.items():
            bits = parameter.data.reshape(-1).view(torch.uint8 if parameter.element_size() == 1 else torch.int16)
            weighted = bits[::2].sum(dtype=torch.int64) * 65537 + bits[1::2].sum(dtype=torch.int64)
            sha.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {int(weighted)};".encode())
    sha.update(rows.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()


class Unfinished:
    """State of one pruning command under `output/.progress`: one file a block, each written atomically.

    Args:
        output: the command's output folder.
        command: what decides the result, JSON values by name; a stored state of another command is refused.
        overwrite: delete another command's state instead.

    Raises:
        MamaError: the folder holds the state of another command.
    """

    def __init__(self, output: str | Path, command: dict, overwrite: bool = False):
        self.folder = Path(output) / FOLDER
        self._command = json.loads(json.dumps(command))
        self._overwrite = overwrite
        self._fresh = False  # whether this command has begun, and found nothing
        self._whole: set[Path] = set()  # files of blocks that have been read and are as they were written
        self._check(self._stored())

    @staticmethod
    def exists(output: str | Path) -> bool:
        """Whether a killed command left its work there, had just begun to, or was about to take it away."""
        output, folder = Path(output), Path(output) / FOLDER
        if not is_dir(folder):
            return False
        if is_file(folder / COMMAND):
            return True
        ours = all(entry.match(".*.tmp") or entry.name == OFFLOADED for entry in folder.iterdir())
        alone = all(entry.name in (FOLDER, LOCK, WRITING) for entry in output.iterdir())
        return ours and (alone or is_file(output / "config.json"))

    @property
    def blocks(self) -> int:
        """How many finished blocks are stored."""
        return 0 if self._stored() is None else len(list(self.folder.glob("*.safetensors")))

    def begin(self, model: nn.Module, rows: Tensor) -> None:
        """Compares the dense model and the tokens with those of the stored state, and writes what this run is.

        Raises `MamaError` if the model or the tokens have changed since.
        """
        self._command["model and calibration tokens"] = fingerprint(model, rows)
        stored = self._stored()
        if stored is None and self.folder.exists():
            if any(entry.name != OFFLOADED for entry in self.folder.iterdir()):
                logger.warning("%s holds blocks of nobody knows which command: all are done again.", self.folder)
            self._forget()
        self._check(stored, begin=True)
        write_json(self.folder / COMMAND, self._command)
        self._fresh = stored is None

    def store(self, targets: list[Target], masks: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        """Writes weights, biases and masks (out, in) of the finished block `targets`, and its `others` parameters."""
        tensors = {}
        for target in targets:
            tensors[f"weight {target.name}"] = target.matrix.cpu().contiguous().clone()
            tensors[f"mask {target.name}"] = pack_bits(masks[target.name]).cpu()
            if target.bias is not None:
                tensors[f"bias {target.name}"] = target.bias.detach().cpu().clone()
        tensors |= {f"other {name}": value.detach().cpu().clone() for name, value in others.items()}
        write_tensors(self._file(targets), tensors, {"format": "mama-progress-2"})
        self._whole.add(self._file(targets))

    def holds(self, targets: list[Target]) -> bool:
        """Whether the block `targets` is stored; a damaged file is deleted, which is logged, and done again."""
        path = self._file(targets)
        if path not in self._whole and path.exists():
            try:
                self._read(targets)
                self._whole.add(path)
            except MamaError as error:
                logger.warning("a finished block is done again: %s", error)
                path.unlink(missing_ok=True)
        return path in self._whole

    def restore(self, targets: list[Target], masks: dict[str, Tensor], others: dict[str, Tensor]) -> None:
        """Writes a stored block into the model and `masks`."""
        stored = self._read(targets)
        for name, value in others.items():
            if f"other {name}" in stored:
                value.copy_(stored[f"other {name}"])
        for target in targets:
            target.matrix.copy_(stored[f"weight {target.name}"])
            bits = stored[f"mask {target.name}"].to(target.parameter.device)
            masks[target.name] = unpack_bits(bits, target.shape)
            if target.bias is not None:
                target.bias.data.copy_(stored[f"bias {target.name}"])

    def retract(self) -> None:
        """Takes away that this command has begun, if nothing has come of it: it was refused after all."""
        if self._fresh and not self.blocks:
            self.remove()
        remove_written(self.folder, {OFFLOADED: NAMES[OFFLOADED]})  # also of a model that was refused when loaded

    def remove(self) -> None:
        """Deletes the stored blocks, and the folder if nothing else lies in it; last of all what they belong to."""
        self._whole.clear()
        remove_written(self.folder, {name: inner for name, inner in NAMES.items() if name != COMMAND})
        remove_written(self.folder, NAMES)

    def _forget(self) -> None:
        """Deletes the blocks of another command, but not what this one's model is fetched from."""
        self._whole.clear()
        remove_written(self.folder, {**BLOCKS, COMMAND: None})

    def _read(self, targets: list[Target]) -> dict[str, Tensor]:
        """The tensors of a stored block. Raises `MamaError` if they are not those of `targets`."""
        file = TensorFile(self._file(targets), "block of an unfinished pruning", "it is done again")
        found = {name: file.read(name) for name in file.names if name.startswith("other ")}
        for target in targets:
            wanted = {f"weight {target.name}": target.shape, f"mask {target.name}": (bytes_for(target.matrix.numel()),)}
            if target.bias is not None:
                wanted[f"bias {target.name}"] = tuple(target.bias.shape)
            for name, shape in wanted.items():
                found[name] = file.read(name)
                if tuple(found[name].shape) != shape:
                    raise file.damaged(f"{name} has another shape")
        return found

    def _file(self, targets: list[Target]) -> Path:
        block = targets[0].block
        return self.folder / ("outside.safetensors" if block is None else f"block-{block:05d}.safetensors")

    def _stored(self) -> dict | None:
        """What the stored work belongs to; None if that is not there or not to be read."""
        try:
            stored = json.loads((self.folder / COMMAND).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return stored if isinstance(stored, dict) else None

    def _check(self, stored: dict | None, begin: bool = False) -> None:
        for name, value in self._command.items():
            if stored is not None and name in stored and stored[name] != value:
                if self._overwrite:
                    if begin:
                        self._forget()
                    return
                was = "other ones" if name.startswith("model and") else f"{shown(stored[name])}, not {shown(value)}"
                raise MamaError(
                    f"{self.folder.parent} holds the unfinished work of another command ({name}: {was}): call that one "
                    "again to finish it, or give --overwrite to start anew."
                )


class KeptProgress(Progress):
    """Keeps each finished block in `unfinished`, and takes it from there when the command is called again."""

    def __init__(self, label: str, unfinished: Unfinished, shown: bool = True):
        super().__init__(label, shown)
        self._unfinished = unfinished

    def holds(self, targets: list[Target]) -> bool:
        return self._unfinished.holds(targets)

    def restore(self, targets: list[Target], others: Optional[dict[str, Tensor]] = None) -> None:
        self._unfinished.restore(targets, self.masks, others or {})

    def finish(self, targets: list[Target], others: Optional[dict[str, Tensor]] = None) -> None:
        self._unfinished.store(targets, self.masks, others or {})
