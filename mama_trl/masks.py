"""`MaskSet`: which connections are kept, one bit each, in memory and on disk."""

import hashlib
import json
import os
from pathlib import Path
from typing import Optional

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import MamaError

FOLDER = "mama"  # beside the model's own files
MASKS_FILE = "masks.safetensors"


def pack_bits(mask: Tensor) -> Tensor:
    """Bool tensor of any shape to uint8, 8 flags a byte, lowest bit first, the last byte padded with 0."""
    flat = mask.reshape(-1)
    padded = torch.zeros((flat.numel() + 7) // 8 * 8, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = flat
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=flat.device)
    return (padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: torch.Size | tuple) -> Tensor:
    """Inverse of `pack_bits`: bool tensor of `shape`."""
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=bits.device)
    count = 1
    for size in shape:
        count *= size
    return (bits.unsqueeze(1) & weights).ne(0).view(-1)[:count].view(shape)


def write_atomically(path: Path, write) -> None:
    """Calls `write(temporary)` and renames: a kill or a full disk never leaves half a file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise MamaError(f"cannot write {path}: {error}; free some space or choose another output_dir.") from error
    finally:
        temporary.unlink(missing_ok=True)


class MaskSet:
    """Masks by parameter name, in the layout of the parameter (GPT-2's Conv1D is (in, out)).

    Args:
        bits: packed masks, uint8.
        shapes: shape of each parameter.
        pattern: `unstructured` or N:M.
    """

    def __init__(self, bits: dict[str, Tensor], shapes: dict[str, tuple], pattern: str = "unstructured"):
        self.bits = bits
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.pattern = pattern

    @classmethod
    def from_masks(cls, masks: dict[str, Tensor], pattern: str = "unstructured") -> "MaskSet":
        """From bool tensors, True = kept."""
        return cls(
            {name: pack_bits(mask) for name, mask in masks.items()},
            {name: tuple(mask.shape) for name, mask in masks.items()},
            pattern,
        )

    @property
    def names(self) -> list[str]:
        return list(self.bits)

    def mask(self, name: str) -> Tensor:
        """Bool mask of one parameter, True = kept."""
        return unpack_bits(self.bits[name], self.shapes[name])

    def sparsity(self, name: Optional[str] = None) -> float:
        """Pruned share of one parameter, or of all masked parameters together."""
        names = [name] if name else self.names
        total = sum(torch.Size(self.shapes[n]).numel() for n in names)
        return 1.0 - sum(int(self.mask(n).sum()) for n in names) / total

    def digest(self) -> str:
        """SHA-256 over names and bits: equal on ranks and runs that agree."""
        sha = hashlib.sha256()
        for name in sorted(self.bits):
            sha.update(name.encode())
            sha.update(self.bits[name].cpu().numpy().tobytes())
        return sha.hexdigest()

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Zeroes pruned connections in place, also those that are NaN (0 times NaN would stay NaN)."""
        for name, parameter in self._parameters(model):
            self.bits[name] = self.bits[name].to(parameter.device)
            parameter.data.masked_fill_(~self.mask(name), 0)

    @torch.no_grad()
    def verify(self, model: nn.Module) -> int:
        """Number of pruned connections that are not exactly 0.0."""
        return sum(
            int((parameter.data[~self.mask(name).to(parameter.device)] != 0).sum())
            for name, parameter in self._parameters(model)
        )

    def check(self, model: nn.Module, where: str) -> None:
        """Raises `MamaError` naming the first parameter that does not fit `model`; `where` names the file."""
        parameters = dict(model.named_parameters())
        for name, shape in self.shapes.items():
            if name not in parameters:
                raise MamaError(
                    f"{where} holds a mask for {name}, which this model lacks: it belongs to another model; "
                    "give its own masks, or set inherit_masks to false."
                )
            if tuple(parameters[name].shape) != shape:
                raise MamaError(
                    f"{where} holds a mask of shape {list(shape)} for {name}, whose shape is "
                    f"{list(parameters[name].shape)}: it belongs to another model; give its own masks, or set "
                    "inherit_masks to false."
                )

    def save(self, folder: str | Path) -> Path:
        """Writes `folder/mama/masks.safetensors` atomically; returns its path."""
        path = Path(folder) / FOLDER / MASKS_FILE
        header = {"shapes": json.dumps(self.shapes), "pattern": self.pattern, "format": "mama-masks-1"}
        tensors = {name: bits.cpu().contiguous() for name, bits in self.bits.items()}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Optional["MaskSet"]:
        """Reads what `save` wrote; None if there is no mask file. Raises `MamaError` if it is damaged."""
        path = Path(folder) / FOLDER / MASKS_FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                shapes = json.loads(header["shapes"])
                bits = {name: file.get_tensor(name) for name in shapes}
        except Exception as error:
            raise MamaError(f"{path} is no readable mask file ({error}): delete it or restore it.") from error
        return cls(bits, shapes, header.get("pattern", "unstructured"))

    def _parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        parameters = dict(model.named_parameters())
        return [(name, parameters[name]) for name in self.bits]
