"""Finished blocks of a running `mama prune` on disk, so that a killed run goes on where it was."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..calibration.progress import Progress
from ..errors import MamaError
from ..folders import write_atomically
from ..masks.bits import pack_bits, unpack_bits
from ..model.targets import Target

FOLDER = ".progress"  # inside the output folder, removed at the end
COMMAND = "command.json"
NAMES = (COMMAND, "block-*.safetensors", "outside.safetensors", ".*.tmp")  # all that lies in FOLDER


def fingerprint(model: nn.Module, rows: Tensor) -> str:
    """SHA-256 over the model's parameters (names, shapes, an exact sum of their bits) and the calibration tokens."""
    sha = hashlib.sha256()
    for name, parameter in model.named_parameters():
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
        self._check(self._stored())

    @staticmethod
    def exists(output: str | Path) -> bool:
        """Whether a killed command left its work there, or began to, or had begun to take it away."""
        folder = Path(output) / FOLDER
        return folder.is_dir() and all(any(map(entry.match, NAMES)) for entry in folder.iterdir())

    @property
    def blocks(self) -> int:
        """How many finished blocks are stored."""
        return len(list(self.folder.glob("*.safetensors")))

    def begin(self, model: nn.Module, rows: Tensor) -> None:
        """Compares the dense model and the tokens with those of the stored state, and writes what this run is.

        Raises `MamaError` if the model or the tokens have changed since.
        """
        self._command["model and calibration tokens"] = fingerprint(model, rows)
        self._check(self._stored())
        text = json.dumps(self._command, indent=1)
        write_atomically(self.folder / COMMAND, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def store(self, targets: list[Target], masks: dict[str, Tensor]) -> None:
        """Writes weights, biases and masks (out, in) of the finished block `targets`."""
        tensors = {}
        for target in targets:
            tensors[f"weight {target.name}"] = target.matrix.cpu().contiguous().clone()
            tensors[f"mask {target.name}"] = pack_bits(masks[target.name]).cpu()
            if target.bias is not None:
                tensors[f"bias {target.name}"] = target.bias.detach().cpu().clone()
        write_atomically(self._file(targets), lambda temporary: save_file(tensors, temporary))

    def holds(self, targets: list[Target]) -> bool:
        """Whether the block `targets` is stored."""
        return self._file(targets).exists()

    def restore(self, targets: list[Target], masks: dict[str, Tensor]) -> None:
        """Writes a stored block into the model and `masks`."""
        stored = load_file(self._file(targets))
        for target in targets:
            target.matrix.copy_(stored[f"weight {target.name}"])
            bits = stored[f"mask {target.name}"].to(target.parameter.device)
            masks[target.name] = unpack_bits(bits, target.shape)
            if target.bias is not None:
                target.bias.data.copy_(stored[f"bias {target.name}"])

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, targets: list[Target]) -> Path:
        block = targets[0].block
        return self.folder / ("outside.safetensors" if block is None else f"block-{block:05d}.safetensors")

    def _stored(self) -> dict:
        try:
            return json.loads((self.folder / COMMAND).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _check(self, stored: dict) -> None:
        for name, value in self._command.items():
            if name in stored and stored[name] != value:
                if self._overwrite:
                    self.remove()
                    return
                was = "other ones" if name.startswith("model and") else f"{stored[name]!r}, not {value!r}"
                raise MamaError(
                    f"{self.folder.parent} holds the unfinished work of another command ({name}: {was}): call that one "
                    "again to finish it, or give --overwrite to start anew."
                )
        if not stored and self.folder.exists():
            self.remove()  # blocks of nobody knows what


class KeptProgress(Progress):
    """Keeps each finished block in `unfinished`, and takes it from there when the command is called again."""

    def __init__(self, label: str, unfinished: Unfinished, shown: bool = True):
        super().__init__(label, shown)
        self._unfinished = unfinished

    def holds(self, targets: list[Target]) -> bool:
        return self._unfinished.holds(targets)

    def restore(self, targets: list[Target]) -> None:
        self._unfinished.restore(targets, self.masks)

    def finish(self, targets: list[Target]) -> None:
        self._unfinished.store(targets, self.masks)
