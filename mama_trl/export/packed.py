"""A small file for a sparse model: one safetensors file with the kept values and bit masks."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import MamaError
from ..masks.bits import bytes_for, count, pack_bits, unpack_bits
from ..masks.maskset import MaskSet
from ..masks.tensors import TensorFile, write_tensors


def save_packed(model: nn.Module, masks: MaskSet, path: str | Path) -> int:
    """Writes kept values (in order) and bit masks of masked parameters, everything else as it is.

    Tied parameters are stored once. Returns the number of bytes. Raises `MamaError` if a pruned connection is
    not zero, since it would be lost.
    """
    if masks.verify(model):
        raise MamaError("pruned connections are not zero, so packing would lose them: apply the masks first.")
    tensors, shapes, tied, first = {}, {}, {}, {}
    for name, value in model.state_dict().items():
        origin = first.setdefault((value.data_ptr(), value.shape), name) if value.numel() else name
        if origin != name:
            tied[name] = origin
        elif name in masks.names:
            mask = masks.mask(name).to(value.device)
            tensors[f"values/{name}"] = value[mask].cpu().contiguous()
            tensors[f"mask/{name}"] = pack_bits(mask).cpu()
            shapes[name] = list(value.shape)
        else:
            tensors[f"dense/{name}"] = value.cpu().contiguous()
    path = Path(path)
    write_tensors(path, tensors, {"format": "mama-packed-2", "shapes": shapes, "tied": tied})
    return path.stat().st_size


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The state dict that `save_packed` wrote, bit for bit. Raises `MamaError` if the file is damaged."""
    file = TensorFile(path, "packed file", "pack the model again")
    shapes, tied = _header(file)
    state = {}
    for key in file.names:
        kind, _, name = key.partition("/")
        if kind == "dense":
            state[name] = file.read(key)
        elif kind == "values":
            state[name] = _unpacked(file, name, shapes)
        elif kind != "mask":
            raise file.damaged(f"it has an unknown {key}")
    for name, origin in tied.items():
        if origin not in state:
            raise file.damaged(f"{name} is tied to {origin}, which it does not hold")
        state[name] = state[origin]
    return state


def _unpacked(file: TensorFile, name: str, shapes: dict[str, tuple]) -> Tensor:
    values, bits = file.read(f"values/{name}"), file.read(f"mask/{name}")
    shape = shapes.get(name)
    if shape is None or bits.dtype != torch.uint8 or bits.shape != (bytes_for(math.prod(shape)),):
        raise file.damaged(f"the mask of {name} does not have the shape that its header says")
    if values.dim() != 1 or int(count(bits)) != len(values):
        raise file.damaged(f"{name} has {values.numel()} values for {int(count(bits))} kept connections")
    mask = unpack_bits(bits, shape)
    if int(mask.sum()) != len(values):
        raise file.damaged(f"the mask of {name} keeps connections beyond its end")
    return values.new_zeros(shape).masked_scatter_(mask, values)


def _header(file: TensorFile) -> tuple[dict[str, tuple], dict[str, str]]:
    """Shapes of the masked parameters, and which names are tied to which. Raises `MamaError` if they make no sense."""
    found = [file.header.get(name) for name in ("shapes", "tied")]
    shapes, tied = found
    if not all(isinstance(entry, dict) for entry in found) or not all(isinstance(name, str) for name in tied.values()):
        raise file.damaged("its header does not say what is tied and of which shape")
    if not all(isinstance(s, list) and all(type(n) is int and n >= 0 for n in s) for s in shapes.values()):
        raise file.damaged("its header has shapes that are none")
    return {name: tuple(shape) for name, shape in shapes.items()}, tied
