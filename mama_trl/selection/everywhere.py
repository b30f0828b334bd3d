"""One threshold over all matrices (scope `global`), with a least density for each."""

from typing import Callable

import torch
from torch import Tensor

from ..engines import ranks
from ..errors import MamaError
from ..masks.bits import unpack_bits
from .keys import ordered_keys, value_of
from .largest import packed_above, packed_masks
from .threshold import NAN_SCORE, Threshold, chunks, kept_count


def exact_mean(scores: Tensor, numel: int, group: ranks.Group = None) -> float:
    """Mean of non-negative scores over all ranks, the same to the last bit for any split of them.

    Float sums depend on their order; so the scores are counted in steps of 2^-30 of the largest one, as integers.
    """
    flat = scores.reshape(-1)
    largest = torch.zeros((), device=flat.device)
    if flat.numel():
        largest = flat.max().float()
    largest = ranks.gathered(largest, group).max()
    if torch.isnan(largest):
        raise MamaError(NAN_SCORE)
    steps = torch.zeros((), dtype=torch.int64, device=flat.device)
    for chunk in chunks([flat]):
        steps += (chunk.float() / largest.clamp_min(1e-38) * (1 << 30)).to(torch.int64).sum()
    return float(ranks.total(steps, group)) / (1 << 30) / numel * float(largest)


def _floor_masks(parts: list[Tensor], keeps: list[int], group: ranks.Group) -> list[Tensor]:
    """The `keeps[i]` largest of each matrix i over all ranks, as packed bits; 1-D non-negative scores.

    All thresholds at once by bisection over the 31 bits of their keys: each round adds one count per matrix, where a
    selection of its own would send a histogram for each.
    """
    keys = [ordered_keys(part) for part in parts]
    wanted = torch.tensor(keeps, device=parts[0].device)
    threshold = torch.zeros_like(wanted)

    def counts(compare: Callable[[Tensor, Tensor], Tensor], edges: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int64, device=edges.device)
        return torch.stack([
            sum((torch.count_nonzero(compare(chunk, edge)) for chunk in chunks([own])), zero)
            for own, edge in zip(keys, edges.int())
        ])

    for bit in range(30, -1, -1):
        candidate = threshold + (1 << bit)
        threshold = torch.where(ranks.total(counts(torch.ge, candidate), group) >= wanted, candidate, threshold)
    above = ranks.total(counts(torch.gt, threshold), group)
    at = ranks.gathered(counts(torch.eq, threshold), group)  # (ranks, matrices)
    before = (at.cumsum(0) - at)[ranks.rank(group)]
    ties = (wanted - above - before).clamp_min(0).minimum(at[ranks.rank(group)])
    rows = zip(parts, threshold.tolist(), ties.tolist(), at.sum(0).tolist(), (wanted - above).tolist())
    return [
        packed_above(part, Threshold(value_of(key, part.dtype), needed, level), own)
        for part, key, own, level, needed in rows
    ]


def global_packed_masks(
    parts: list[Tensor], sizes: list[int], sparsity: float, floor: float = 0.25, group: ranks.Group = None
) -> list[Tensor]:
    """Masks by one threshold over all matrices, each divided by its mean, with a least density for each. Packed bits.

    Args:
        parts: this rank's non-negative fp32 scores of each matrix. They are overwritten.
        sizes: connections of each whole matrix.
        floor: least density a matrix keeps, as a share of the overall density: a raw global threshold starves
            whole layers.

    Exactly `kept_count(total, sparsity)` connections are kept over all matrices and ranks.
    """
    keep = kept_count(sum(sizes), sparsity)
    floors = [int(floor * (1 - sparsity) * size) for size in sizes]
    for part, size in zip(parts, sizes):
        part.div_(max(exact_mean(part, size, group), 1e-30))
    reserved = _floor_masks([part.view(-1) for part in parts], floors, group)
    for part, held in zip(parts, reserved):  # what the floor holds is out of the race for the rest
        part.view(-1).masked_fill_(unpack_bits(held, (part.numel(),)), float("-inf"))
    rest = packed_masks(parts, keep - sum(floors), group)
    return [first | second for first, second in zip(reserved, rest)]
