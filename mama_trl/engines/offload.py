"""Weights that accelerate keeps on disk or in CPU memory until a module runs: fetched for a while, given back changed.

Transformers loads such a model where `device_map` says so; a hook of accelerate then fetches each layer's weights
before its forward pass and drops them behind it. That is right for one pass of the model. Whoever looks at weights,
runs one block many times or changes it says so by `readable` and `give_back`; where nothing is offloaded both do
nothing.
"""

import ctypes
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from safetensors.torch import save_file
from torch import nn

# glibc keeps what is freed, in pieces that the next block's tensors do not fit: the system gets them back.
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def _hooks(module: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    """The submodules whose weights are elsewhere, each with the hook that fetches them."""
    found = []
    for inner in module.modules():
        hook = getattr(inner, "_hf_hook", None)
        for own in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
            if isinstance(own, AlignDevicesHook) and own.weights_map is not None:
                found.append((inner, own))
    return found


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are not there until their module runs."""
    return bool(_hooks(model))


@contextmanager
def readable(module: nn.Module) -> Iterator[None]:
    """All parameters of `module` are there, and stay through its forward passes; changes are forgotten behind it.

    May be nested: the outermost one fetches and drops.
    """
    own = fetch(module)
    try:
        yield
    finally:
        drop(own)


def readable_parameters(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """All parameters by name, in order: at once, or module by module where they are elsewhere, while each is there."""
    named = dict(model.named_parameters())  # of tied ones the first
    if not is_offloaded(model):
        yield named
        return
    for prefix, module in model.named_modules():
        names = [f"{prefix}.{own}".lstrip(".") for own, _ in module.named_parameters(recurse=False)]
        if names:
            with readable(module):
                found = dict(module.named_parameters(prefix, recurse=False))
                yield {name: found[name] for name in names if name in named}


def fetch(module: nn.Module) -> list[tuple[nn.Module, AlignDevicesHook]]:
    """Brings in the weights that are elsewhere; returns which, for `drop`."""
    own = [(inner, hook) for inner, hook in _hooks(module) if hook.offload]
    for inner, hook in own:
        hook.pre_forward(inner)
        hook.offload = False
    return own


def drop(own: list[tuple[nn.Module, AlignDevicesHook]]) -> None:
    """Drops weights that `fetch` has brought in, and what was changed of them."""
    for inner, hook in own:
        hook.offload = True
        hook.post_forward(inner, None)
    if own and _TRIM is not None:
        _TRIM(0)


def give_back(own: list[tuple[nn.Module, AlignDevicesHook]], file: Path) -> None:
    """Drops weights that `fetch` has brought in, and has them fetched as they are now from here on.

    Args:
        file: where they are written (.safetensors), if that is not CPU memory.
    """
    written: dict[str, torch.Tensor] = {}
    for inner, hook in own:
        prefix, stored = getattr(hook.weights_map, "prefix", ""), getattr(hook.weights_map, "dataset", hook.weights_map)
        memory = stored if isinstance(stored, dict) else stored.state_dict
        for name, parameter in inner.named_parameters(recurse=hook.place_submodules):
            key, value = prefix + name, parameter.detach().to("cpu", copy=True)
            if key in memory:
                memory[key] = value
            else:
                written[key] = value.contiguous()
                stored.index[key] = {
                    "safetensors_file": str(file), "weight_name": key, "dtype": str(value.dtype).removeprefix("torch."),
                }
    if written:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(written, f"{file}.tmp")
        os.replace(f"{file}.tmp", file)
    drop(own)


def running_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs: the device of its first parameter, or where that is fetched to."""
    first = next(model.parameters())
    hooks = _hooks(model) if first.is_meta else []
    return torch.device(hooks[0][1].execution_device) if hooks else first.device
