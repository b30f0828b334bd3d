"""Where a model's weights lie while it is pruned: on the device, or one block at a time, by what fits."""

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import nn

from ..disk.machine import available_memory
from ..errors import MamaError
from ..model.blocks import find_blocks
from . import weights
from .loading import load_config

OFFLOADS = ("none", "cpu", "disk")
SHARE = 0.8  # of the memory that is free


@dataclass(frozen=True)
class Placing:
    """Args:
    device: where blocks run.
    offload: where the other blocks are meanwhile: `none` = on the device too, `cpu`, or `disk`.
    device_map: as `from_pretrained` takes it; None without offloading.
    held: bytes that are expected on the device at once.
    said: all of that in a sentence.
    """

    device: torch.device
    offload: str
    device_map: Optional[dict[str, Any]]
    held: int
    said: str


def placing_of(
    source: str, dtype: str, tokens: int, device: Optional[str] = None, offload: Optional[str] = None
) -> Placing:
    """What fits, or what was asked for.

    Args:
        dtype: as `load_model` takes it.
        tokens: of all calibration sequences.
        device: default the GPU if there is one.
        offload: one of `OFFLOADS`; default the first of them that fits into four fifths of what is free.

    Raises:
        MamaError: the device is not there, or the offloading makes no sense on it.
    """
    where = device_of(device)
    if offload == "cpu" and where.type == "cpu":
        raise MamaError("`offload` is 'cpu', but blocks run in CPU memory already: use disk, or leave it out.")
    config = load_config(source)
    model = weights.sketch(source, config)
    named = dtype if dtype != "auto" else getattr(config.get_text_config(), "dtype", None) or "float32"
    element = (named if isinstance(named, torch.dtype) else getattr(torch, str(named))).itemsize
    blocks = find_blocks(model)
    every = element * _size(model)
    block = element * max(_size(own) for _, own in blocks)
    rest = every - element * sum(_size(own) for _, own in blocks)
    streams = 2 * tokens * config.get_text_config().hidden_size * element
    work = streams + _work(model)
    free = {"none": _free(where), "cpu": available_memory(), "disk": 0}
    if offload is None:
        fits = [name for name, held in (("none", every + work), ("cpu", every)) if held <= SHARE * free[name]]
        offload = next((name for name in fits if name == "none" or where.type != "cpu"), "disk")
    if offload == "none":
        said = f"{_gb(every)} of weights, {_gb(streams)} of hidden states and {_gb(work - streams)} of work on {where}"
        return Placing(where, offload, None, every + work, said)
    kept = "their files" if offload == "disk" else "CPU memory"
    said = (
        f"one block ({_gb(block)}) of {len(blocks)} at a time, {_gb(rest)} of other weights, {_gb(streams)} of hidden "
        f"states and {_gb(work - streams)} of work on {where}; the other blocks stay in {kept}"
    )
    return Placing(where, offload, _device_map(model, offload, where), block + rest + work, said)


def device_of(name: Optional[str]) -> torch.device:
    """The device of this name; default the GPU if there is one. Raises `MamaError` if it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=(found := torch.device(name)))
    except Exception:
        raise MamaError(f"`device` is {name!r}, which this machine has not: use cpu, or cuda with a GPU.") from None
    return found


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _work(model: nn.Module) -> int:
    """Bytes for the layer problem of the widest layers: grams, inverses and a few copies of weights, in fp32."""
    shapes = [m.weight.shape for _, block in find_blocks(model) for m in block.modules() if hasattr(m, "weight")]
    matrices = [shape[-2:] for shape in shapes if len(shape) > 1]
    return max((4 * (4 * max(shape) ** 2 + 6 * shape.numel()) for shape in matrices), default=0)


def file_size(model: nn.Module) -> int:
    """Bytes of one file of a model whose blocks are elsewhere: three blocks, and 50 MB to 2 GB, so that saving holds
    about as much at once as pruning does."""
    blocks = [sum(p.numel() * p.element_size() for p in block.parameters()) for _, block in find_blocks(model)]
    return min(max(3 * max(blocks), 50_000_000), 2_000_000_000)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _device_map(model: nn.Module, offload: str, device: torch.device) -> dict[str, Any]:
    """The decoder blocks where they are offloaded to, everything else on the device."""
    blocks = {name for name, _ in find_blocks(model)}
    found: dict[str, Any] = {}

    def descend(module: nn.Module, prefix: str) -> None:
        for own, child in module.named_children():
            name = prefix + own
            if name in blocks:
                found[name] = offload
            elif any(block.startswith(name + ".") for block in blocks):
                descend(child, name + ".")
            else:
                found[name] = device.index or 0 if device.type == "cuda" else device.type
    descend(model, "")
    return found
