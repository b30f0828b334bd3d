"""Zeros of saved models, read by the description of safetensors alone: nothing of the package is used."""

import json
import struct
from pathlib import Path

import numpy

_KINDS = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "BF16": "<u2"}  # bf16: zero where all but the sign bit is


def weights_in(folder) -> dict[str, numpy.ndarray]:
    """Every floating-point tensor of `folder/*.safetensors`, by name; bf16 as its bits without the sign."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        for name, entry in json.loads(raw[8 : 8 + length]).items():
            if name == "__metadata__" or entry["dtype"] not in _KINDS:
                continue
            begin, end = entry["data_offsets"]
            values = numpy.frombuffer(raw[8 + length + begin : 8 + length + end], _KINDS[entry["dtype"]])
            found[name] = (values & 0x7FFF if entry["dtype"] == "BF16" else values).reshape(entry["shape"])
    return found


def zeros_in(folder, names) -> dict[str, numpy.ndarray]:
    """Where the named tensors are exactly zero, bool."""
    weights = weights_in(folder)
    return {name: weights[name] == 0 for name in names}


def pruned_names(folder) -> list[str]:
    """The matrices within blocks: 2-D weights with a number in their name, but for norms, embeddings and mixtures."""
    return [
        name for name, values in weights_in(folder).items()
        if values.ndim == 2 and any(part.isdigit() for part in name.split(".")) and name.endswith(".weight")
        and not any(word in name for word in ("embed", "norm", "router", "mlp.gate.weight", "experts"))
    ]


def share(zeros: dict[str, numpy.ndarray]) -> float:
    return sum(int(each.sum()) for each in zeros.values()) / sum(each.size for each in zeros.values())


def revived(before: dict[str, numpy.ndarray], after: dict[str, numpy.ndarray]) -> int:
    """How many zeros of `before` are none in `after`."""
    return sum(int((before[name] & ~after[name]).sum()) for name in before)
