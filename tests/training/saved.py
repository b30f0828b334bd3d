"""Counts what a saved model holds, from the bytes of its files: nothing here comes from the package."""

import json
import struct
from pathlib import Path

import numpy

SIZES = {"F64": "<u8", "F32": "<u4", "F16": "<u2", "BF16": "<u2"}
SIGNS = {"F64": 1 << 63, "F32": 1 << 31, "F16": 1 << 15, "BF16": 1 << 15}


def raw_tensors(folder) -> dict[str, tuple[str, list[int], numpy.ndarray]]:
    """(dtype, shape, bit patterns) of every floating tensor in the weight files of a folder."""
    found = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        data = path.read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in SIZES:
                begin, end = entry["data_offsets"]
                bits = numpy.frombuffer(data[8 + size + begin : 8 + size + end], SIZES[entry["dtype"]])
                found[name] = (entry["dtype"], entry["shape"], bits)
    return found


def zeros(folder, names=None) -> tuple[int, int]:
    """(exact zeros, elements) of the named tensors; default the linear weights within the blocks."""
    count = total = 0
    for name, (dtype, shape, bits) in raw_tensors(folder).items():
        if names is not None and name not in names or names is None and not _linear(name, shape):
            continue
        magnitude = bits & numpy.array(SIGNS[dtype] - 1, bits.dtype)
        count += int((magnitude == 0).sum())
        total += bits.size
    return count, total


def sparsity(folder, names=None) -> float:
    count, total = zeros(folder, names)
    return count / total


def not_finite(folder) -> int:
    """Elements of all weights that are NaN or infinite."""
    exponents = {"F64": 0x7FF << 52, "F32": 0xFF << 23, "F16": 0x1F << 10, "BF16": 0xFF << 7}
    wrong = 0
    for dtype, _, bits in raw_tensors(folder).values():
        exponent = numpy.array(exponents[dtype], bits.dtype)
        wrong += int(((bits & exponent) == exponent).sum())
    return wrong


def same(one, other) -> bool:
    """Whether two folders hold the same weights, bit for bit."""
    a, b = raw_tensors(one), raw_tensors(other)
    return a.keys() == b.keys() and all(
        a[name][:2] == b[name][:2] and numpy.array_equal(a[name][2], b[name][2]) for name in a
    )


def _linear(name: str, shape: list[int]) -> bool:
    inside = ".layers." in name or ".h." in name
    return inside and name.endswith(".weight") and len(shape) == 2 and min(shape) > 1
