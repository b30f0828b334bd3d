"""A small file for a sparse model: one safetensors file with the kept values and bit masks."""

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import MamaError
from ..folders import write_atomically
from ..masks.bits import pack_bits, unpack_bits
from ..masks.maskset import MaskSet


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
    header = {"format": "mama-packed-1", "shapes": json.dumps(shapes), "tied": json.dumps(tied)}
    path = Path(path)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))
    return path.stat().st_size


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The state dict that `save_packed` wrote, bit for bit."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
        shapes, tied = json.loads(header["shapes"]), json.loads(header["tied"])
        state = {}
        for key in file.keys():
            kind, _, name = key.partition("/")
            if kind == "dense":
                state[name] = file.get_tensor(key)
            elif kind == "values":
                values = file.get_tensor(key)
                mask = unpack_bits(file.get_tensor(f"mask/{name}"), tuple(shapes[name]))
                state[name] = values.new_zeros(shapes[name]).masked_scatter_(mask, values)
    state.update({name: state[origin] for name, origin in tied.items()})
    return state
