"""Scores to mask: keep exactly k connections, ties to the lower position, without a sort and without gathering.

The k-th largest score is found by a radix select over the bit patterns of the scores: a histogram of the upper 16
bits, then one of the lower 16 bits within the chosen bin (16-bit scores need one). Ranks add their histograms, so
that each learns the same threshold from about 1 MiB of messages, whatever the number of scores. Everything above
the threshold is kept, and of those equal to it the first ones by global position: identical scores give identical
masks on any number of ranks. On a CPU, where a histogram of everything costs more than comparisons, a sample first
brackets the threshold, so that only the few scores within the bracket enter the histograms.

Scores are fp32, bf16 or fp16 without NaN; -0.0 equals 0.0. Masks are bool or packed bits (masks/bits.py), 1 = kept.
With a process `group`, functions take the flat range of each matrix that this rank owns; ranges follow one another in
rank order and a rank's may be empty.
"""

from typing import Optional

import numpy
import torch
from torch import Tensor

from ..engines import ranks
from ..errors import MamaError
from ..masks.bits import bytes_for, pack_into, unpack_bits
from .bracket import SAMPLED_FROM, sampled_bracket, scan
from .threshold import CHUNK, NAN_SCORE, Threshold, chunks, find_threshold


def packed_masks(parts: list[Tensor], keep: int, group: ranks.Group = None) -> list[Tensor]:
    """The `keep` largest of all scores in `parts` over all ranks, as packed bits for each part.

    Args:
        parts: this rank's scores, any shapes, one dtype and device; parts in the same order on every rank.
        keep: 0 to the number of scores on all ranks.
    """
    parts = [part.reshape(-1) for part in parts]  # once: a transposed matrix is copied by that
    size = int(ranks.total(torch.tensor(sum(part.numel() for part in parts), device=parts[0].device), group))
    if keep <= 0 or keep >= size:
        return [_constant(part, keep >= size) for part in parts]
    if size >= SAMPLED_FROM and parts[0].device.type == "cpu":
        masks = _by_bracket(parts, keep, size, group)
        if masks is not None:
            return masks
    cut = find_threshold(parts, keep, group)
    return [packed_above(part, cut, ties) for part, ties in zip(parts, _ties_of(parts, cut, group))]


def _by_bracket(parts: list[Tensor], keep: int, size: int, group: ranks.Group) -> Optional[list[Tensor]]:
    """`packed_masks` in one pass over the scores: all above a bracket are kept, and of the few within it the largest.

    None where no bracket would pay, or where it turns out not to hold the threshold.
    """
    bracket = sampled_bracket(parts, keep, size, group)
    if bracket is None:
        return None
    found = scan(parts, *bracket)
    counts = torch.tensor([found.above, sum(map(len, found.positions)), found.nans])
    above, within, nans = ranks.total(counts, group).tolist()  # so that a NaN stops all ranks, not only its own
    if nans:
        raise MamaError(NAN_SCORE)
    if not above < keep <= above + within:
        return None
    for mask, where, chosen in zip(found.masks, found.positions, packed_masks(found.values, keep - above, group)):
        where = where[unpack_bits(chosen, (len(where),)).numpy()]
        if len(where):  # positions ascend, so that those of one byte are neighbours
            bytes_, bits = where >> 3, (1 << (where & 7)).astype("uint8")
            starts = numpy.flatnonzero(numpy.diff(bytes_, prepend=-1))
            mask.numpy()[bytes_[starts]] |= numpy.bitwise_or.reduceat(bits, starts)
    return found.masks


def _ties_of(parts: list[Tensor], cut: Threshold, group: ranks.Group) -> list[int]:
    """How many scores equal to the cut this rank keeps of each part, in global order (part, then position)."""
    if cut.ties == cut.level:  # nearly always: all of them are kept, and their order does not matter
        return [part.numel() for part in parts]
    zero = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    equal = torch.stack([sum((torch.count_nonzero(c == cut.value) for c in chunks([p])), zero) for p in parts])
    table = ranks.gathered(equal, group).t()  # (parts, ranks)
    before = table.reshape(-1).cumsum(0).view(table.shape) - table
    return (cut.ties - before[:, ranks.rank(group)]).clamp_min(0).minimum(equal).tolist()


def _constant(part: Tensor, kept: bool) -> Tensor:
    packed = torch.zeros(bytes_for(part.numel()), dtype=torch.uint8, device=part.device)
    for begin in range(0, part.numel() if kept else 0, CHUNK):
        flags = torch.ones(min(CHUNK, part.numel() - begin), dtype=torch.bool, device=part.device)
        pack_into(packed[begin // 8 : begin // 8 + bytes_for(flags.numel())], flags)
    return packed


def packed_above(part: Tensor, cut: Threshold, ties: int) -> Tensor:
    flat = part.reshape(-1)
    packed = torch.empty(bytes_for(flat.numel()), dtype=torch.uint8, device=flat.device)
    for begin in range(0, flat.numel(), CHUNK):
        chunk = flat[begin : begin + CHUNK]
        mask = chunk >= cut.value if cut.ties == cut.level else chunk > cut.value
        if ties and cut.ties < cut.level:
            equal = (chunk == cut.value).nonzero().squeeze(1)[:ties]
            mask[equal] = True
            ties -= equal.numel()
        pack_into(packed[begin // 8 : begin // 8 + bytes_for(mask.numel())], mask)
    return packed


def keep_mask(scores: Tensor, keep: int, group: ranks.Group = None) -> Tensor:
    """Bool mask, shape of `scores`, True at exactly `keep` largest scores; ties to the lower flat index."""
    return unpack_bits(packed_masks([scores], keep, group)[0], scores.shape)
