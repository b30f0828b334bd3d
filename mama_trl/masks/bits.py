"""One bit per connection: packing, unpacking and zeroing by packed bits. Lowest bit first, 1 = kept."""

from functools import lru_cache
from typing import Iterator, MutableMapping

import numpy
import torch
from torch import Tensor

# A bool tensor holds one byte per flag. Read as one int64, eight flags times this number put their bits side by
# side into the top byte: no carry can occur, since each partial product lands on a bit of its own.
_GATHER = 0x0102040810204080
_CHUNK = 1 << 20  # flags handled at once: bounds the extra memory
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bytes_for(flags: int) -> int:
    return (flags + 7) // 8


def pack_bits(mask: Tensor) -> Tensor:
    """Bool tensor of any shape to uint8, 8 flags a byte, the last byte padded with 0."""
    flat = mask.reshape(-1)
    packed = torch.empty(bytes_for(flat.numel()), dtype=torch.uint8, device=flat.device)
    for begin in range(0, flat.numel(), _CHUNK):
        chunk = flat[begin : begin + _CHUNK]
        pack_into(packed[begin // 8 : begin // 8 + bytes_for(chunk.numel())], chunk)
    return packed


def pack_into(packed: Tensor, flags: Tensor) -> None:
    """Packs a 1-D bool tensor into the uint8 tensor `packed`."""
    if flags.device.type == "cpu":
        packed.copy_(torch.from_numpy(numpy.packbits(flags.numpy(), bitorder="little")))
        return
    if flags.numel() % 8 or flags.storage_offset() % 8 or not flags.is_contiguous():
        padded = torch.zeros(packed.numel() * 8, dtype=torch.bool, device=flags.device)
        padded[: flags.numel()] = flags
        flags = padded
    packed.copy_((flags.view(torch.int64) * _GATHER >> 56) & 0xFF)


@lru_cache(maxsize=None)
def _table(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): the flags of every byte."""
    numbers = torch.arange(256, device=device).unsqueeze(1)
    return (numbers >> torch.arange(8, device=device) & 1).to(dtype)


def unpack_flags(packed: Tensor, dtype: torch.dtype = torch.bool) -> Tensor:
    """1-D, 8 values of 0 or 1 per byte, in `dtype`."""
    return _table(dtype, packed.device).index_select(0, packed.int()).view(-1)


def unpack_bits(packed: Tensor, shape: torch.Size | tuple) -> Tensor:
    """Inverse of `pack_bits`: bool tensor of `shape`."""
    return unpack_flags(packed)[: torch.Size(shape).numel()].view(shape)


def keep_only(values: list[Tensor], packed: Tensor) -> None:
    """Sets to exactly 0.0, in place, what `packed` says is pruned; NaN and -0.0 too.

    Args:
        values: 1-D tensors of one dtype; all but the last have a multiple of 8 elements, or their share of
            `packed` is padded to whole bytes.
        packed: uint8, the flags of `values` one after another, each starting on a byte.

    The flags multiply the values' bit patterns as integers: 0 times the bits of NaN is 0, which the float product
    would not be.
    """
    integer = _INTEGER[values[0].element_size()]
    sizes = [bytes_for(value.numel()) * 8 for value in values]
    flags = unpack_flags(packed, integer).split(sizes)
    torch._foreach_mul_(
        [value.view(integer) for value in values], [part[: value.numel()] for part, value in zip(flags, values)]
    )


def count(packed: Tensor) -> Tensor:
    """Number of set bits, int64 scalar tensor."""
    return torch.bincount(packed, minlength=256) @ _table(torch.int64, packed.device).sum(1)


class PackedMasks(MutableMapping[str, Tensor]):
    """Bool masks by name, of which one bit each is kept in memory; what is read is a copy."""

    def __init__(self) -> None:
        self._packed: dict[str, tuple[Tensor, torch.Size]] = {}

    def __getitem__(self, name: str) -> Tensor:
        return unpack_bits(*self._packed[name])

    def __setitem__(self, name: str, mask: Tensor) -> None:
        self._packed[name] = pack_bits(mask), mask.shape

    def __delitem__(self, name: str) -> None:
        del self._packed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._packed)

    def __len__(self) -> int:
        return len(self._packed)
