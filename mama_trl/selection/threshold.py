"""The k-th largest of scores that ranks share: a radix select over their bit patterns, without a sort or a gather."""

from dataclasses import dataclass
from typing import Iterable, Iterator

import torch
from torch import Tensor

from ..engines import ranks
from ..errors import MamaError
from .keys import ordered_keys, value_of

NAN_SCORE = "a score is NaN, so no mask is computed: look for NaN in the weights and their statistics."
_BINS = 1 << 16
_HALF = 1 << 15
CHUNK = 1 << 19  # scores handled at once: bounds the extra memory; a multiple of 8, so that chunks end on bytes


@dataclass(frozen=True)
class Threshold:
    """The cut between kept and pruned: scores above `value` are kept, and the first `ties` of `level` equal to it."""

    value: float
    ties: int
    level: int


def find_threshold(parts: list[Tensor], keep: int, group: ranks.Group = None) -> Threshold:
    """The k-th largest of all scores in `parts` over all ranks, in two rounds of messages at most.

    Args:
        parts: this rank's scores, any shapes, one dtype and device.
        keep: how many to keep of all, 1 <= keep <= their number.

    Raises:
        MamaError: a score is NaN.
    """
    dtype, device = parts[0].dtype, parts[0].device
    wide = dtype not in (torch.bfloat16, torch.float16)
    shift = 16 if wide else 0
    numbers = ((ordered_keys(c) >> shift).add_(_HALF).masked_fill_(torch.isnan(c), _BINS - 1) for c in chunks(parts))
    upper = ranks.total(_histogram(numbers, device), group)
    if upper[-1]:  # no number has this key
        raise MamaError(NAN_SCORE)
    high, rest, level = _bin_of(upper, keep)
    high -= _HALF
    if not wide:
        return Threshold(value_of(high, dtype), rest, level)
    del upper
    inside = (keys[(keys >> 16) == high] for keys in map(ordered_keys, chunks(parts)))
    lower = _histogram((keys.bitwise_and_(_BINS - 1) for keys in inside), device)
    low, ties, level = _bin_of(ranks.total(lower, group), rest)
    return Threshold(value_of((high << 16) | low, dtype), ties, level)


def _histogram(numbers: Iterable[Tensor], device: torch.device) -> Tensor:
    """How often each of 0 ... 65,535 occurs, int64 (65,536,)."""
    result = None
    for chunk in numbers:
        if chunk.numel():
            found = torch.bincount(chunk, minlength=_BINS)
            result = found if result is None else result.add_(found)
    return torch.zeros(_BINS, dtype=torch.int64, device=device) if result is None else result


def chunks(parts: list[Tensor]) -> Iterator[Tensor]:
    for part in parts:
        if part.numel():
            yield from part.reshape(-1).split(CHUNK)


def _bin_of(histogram: Tensor, keep: int) -> tuple[int, int, int]:
    """Highest bin at which `keep` scores are reached from above, how many of its own are needed, how many it has."""
    rows = histogram.view(256, -1)  # first the row of bins, then the bin: no sum along all of them
    row, above = _reached(rows.sum(1), keep)
    column, more = _reached(rows.index_select(0, row).view(-1), keep - above)
    position = row * rows.shape[1] + column
    position, above, inside = torch.cat([position, above + more, histogram.index_select(0, position)]).tolist()
    return position, keep - above, inside


def _reached(counts: Tensor, keep: int | Tensor) -> tuple[Tensor, Tensor]:
    """Last position from which on there are `keep` counts, and how many counts are behind it; both (1,)."""
    own = counts.flip(0)
    reached = own.cumsum(0)
    place = torch.searchsorted(reached, torch.as_tensor(keep, device=counts.device).view(1))
    return len(counts) - 1 - place, (reached - own).index_select(0, place)


def kept_counts(parts: list[Tensor], cut: Threshold, group: ranks.Group = None) -> list[int]:
    """How many connections of each matrix a cut keeps, over all ranks."""
    zero = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    above = [sum((torch.count_nonzero(c > cut.value) for c in chunks([p])), zero) for p in parts]
    at = [sum((torch.count_nonzero(c == cut.value) for c in chunks([p])), zero) for p in parts]
    counts = ranks.total(torch.stack([torch.stack(above), torch.stack(at)]), group).tolist()
    left, kept = cut.ties, []
    for more, equal in zip(*counts):
        taken = min(left, equal)
        left -= taken
        kept.append(more + taken)
    return kept


def kept_count(numel: int, sparsity: float) -> int:
    """Connections kept of `numel` at `sparsity`, rounded half to even; at least one."""
    return max(1, numel - round(numel * sparsity))
