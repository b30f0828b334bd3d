"""Indicator to mask: keep exactly k connections, ties to the lower position, without a sort and without gathering.

The k-th largest score is found by a radix select over the bit patterns of the scores: a histogram of the upper 16
bits, then one of the lower 16 bits within the chosen bin (16-bit scores need one). Ranks add their histograms, so
that each learns the same threshold from about 1 MiB of messages, whatever the number of scores. Everything above
the threshold is kept, and of those equal to it the first ones by global position: identical scores give identical
masks on any number of ranks. On a CPU, where a histogram of everything costs more than comparisons, a sample first
brackets the threshold, so that only the few scores within the bracket enter the histograms.

Scores are fp32, bf16 or fp16 without NaN; -0.0 equals 0.0. Masks are bool or packed bits (see bits.py), 1 = kept.
With a `group`, functions take the flat range of each matrix that this rank owns; ranges follow one another in rank
order and a rank's may be empty.
"""

from dataclasses import dataclass
from typing import Callable, Iterable, Iterator, Optional

import numpy
import torch
from torch import Tensor

from . import ranks
from .bits import bytes_for, pack_into, unpack_bits
from .bracket import SAMPLED_FROM, sampled_bracket, scan
from .errors import MamaError
from .keys import ordered_keys, value_of

NAN_SCORE = "a score is NaN, so no mask is computed: look for NaN in the weights and their statistics."
_BINS = 1 << 16
_HALF = 1 << 15
_CHUNK = 1 << 19  # scores handled at once: bounds the extra memory; a multiple of 8, so that chunks end on bytes
_LEAST = -(1 << 31)  # below the key of -inf


# ---------------------------------------------------------------------- the threshold


@dataclass(frozen=True)
class Cut:
    """Where a selection ends: all scores above `value` are kept, and the first `ties` of the `level` equal to it."""

    value: float
    ties: int
    level: int


def find_cut(parts: list[Tensor], keep: int, group: ranks.Group = None) -> Cut:
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
    numbers = ((ordered_keys(c) >> shift).add_(_HALF).masked_fill_(torch.isnan(c), _BINS - 1) for c in _chunks(parts))
    upper = ranks.total(_histogram(numbers, device), group)
    if upper[-1]:  # no number has this key
        raise MamaError(NAN_SCORE)
    high, rest, level = _bin_of(upper, keep)
    high -= _HALF
    if not wide:
        return Cut(value_of(high, dtype), rest, level)
    del upper
    inside = (keys[(keys >> 16) == high] for keys in map(ordered_keys, _chunks(parts)))
    lower = _histogram((keys.bitwise_and_(_BINS - 1) for keys in inside), device)
    low, ties, level = _bin_of(ranks.total(lower, group), rest)
    return Cut(value_of((high << 16) | low, dtype), ties, level)


def _histogram(numbers: Iterable[Tensor], device: torch.device) -> Tensor:
    """How often each of 0 ... 65,535 occurs, int64 (65,536,)."""
    result = None
    for chunk in numbers:
        if chunk.numel():
            found = torch.bincount(chunk, minlength=_BINS)
            result = found if result is None else result.add_(found)
    return torch.zeros(_BINS, dtype=torch.int64, device=device) if result is None else result


def _chunks(parts: list[Tensor]) -> Iterator[Tensor]:
    for part in parts:
        if part.numel():
            yield from part.reshape(-1).split(_CHUNK)


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


def _ties_of(parts: list[Tensor], cut: Cut, group: ranks.Group) -> list[int]:
    """How many scores equal to the cut this rank keeps of each part, in global order (part, then position)."""
    if cut.ties == cut.level:  # nearly always: all of them are kept, and their order does not matter
        return [part.numel() for part in parts]
    zero = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    equal = torch.stack([sum((torch.count_nonzero(c == cut.value) for c in _chunks([p])), zero) for p in parts])
    table = ranks.gathered(equal, group).t()  # (parts, ranks)
    before = table.reshape(-1).cumsum(0).view(table.shape) - table
    return (cut.ties - before[:, ranks.rank(group)]).clamp_min(0).minimum(equal).tolist()


def kept_counts(parts: list[Tensor], cut: Cut, group: ranks.Group = None) -> list[int]:
    """How many connections of each matrix a cut keeps, over all ranks."""
    zero = torch.zeros((), dtype=torch.int64, device=parts[0].device)
    above = [sum((torch.count_nonzero(c > cut.value) for c in _chunks([p])), zero) for p in parts]
    at = [sum((torch.count_nonzero(c == cut.value) for c in _chunks([p])), zero) for p in parts]
    counts = ranks.total(torch.stack([torch.stack(above), torch.stack(at)]), group).tolist()
    left, kept = cut.ties, []
    for more, equal in zip(*counts):
        taken = min(left, equal)
        left -= taken
        kept.append(more + taken)
    return kept


# ---------------------------------------------------------------------- masks over everything given


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
    cut = find_cut(parts, keep, group)
    return [_packed(part, cut, ties) for part, ties in zip(parts, _ties_of(parts, cut, group))]


def _by_bracket(parts: list[Tensor], keep: int, size: int, group: ranks.Group) -> Optional[list[Tensor]]:
    """`packed_masks` in one pass over the scores: all above a bracket are kept, and the few within it are selected
    from in their turn. None where no bracket would pay, or where it turns out not to hold the threshold."""
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


def _constant(part: Tensor, kept: bool) -> Tensor:
    packed = torch.zeros(bytes_for(part.numel()), dtype=torch.uint8, device=part.device)
    for begin in range(0, part.numel() if kept else 0, _CHUNK):
        flags = torch.ones(min(_CHUNK, part.numel() - begin), dtype=torch.bool, device=part.device)
        pack_into(packed[begin // 8 : begin // 8 + bytes_for(flags.numel())], flags)
    return packed


def _packed(part: Tensor, cut: Cut, ties: int) -> Tensor:
    flat = part.reshape(-1)
    packed = torch.empty(bytes_for(flat.numel()), dtype=torch.uint8, device=flat.device)
    for begin in range(0, flat.numel(), _CHUNK):
        chunk = flat[begin : begin + _CHUNK]
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


def kept_count(numel: int, sparsity: float) -> int:
    """Connections kept of `numel` at `sparsity`, rounded half to even; at least one."""
    return max(1, numel - round(numel * sparsity))


# ---------------------------------------------------------------------- rows and groups of one matrix


@dataclass(frozen=True)
class Piece:
    """What this rank owns of one matrix's scores, and how its connections lie in the parameter.

    Args:
        scores: 1-D, the flat range of the parameter from `start` on.
        shape: of the whole parameter; (out, in), or (in, out) if `transposed` (GPT-2's Conv1D).
    """

    scores: Tensor
    start: int
    shape: tuple[int, int]
    transposed: bool = False

    def block(self) -> tuple[Tensor, int]:
        """Keys as whole lines of the parameter, (lines, columns), filled up with the least key; first line's number."""
        columns = self.shape[1]
        first, last = self.start // columns, -(-(self.start + self.scores.numel()) // columns)
        keys = ordered_keys(self.scores)
        if keys.numel() == (last - first) * columns:
            return keys.view(-1, columns), first
        lines = torch.full(((last - first) * columns,), _LEAST, dtype=torch.int32, device=keys.device)
        offset = self.start - first * columns
        lines[offset : offset + keys.numel()] = keys
        return lines.view(-1, columns), first

    def cut_from(self, lines: Tensor, first: int) -> Tensor:
        """The owned range of a (lines, columns) tensor, 1-D."""
        offset = self.start - first * self.shape[1]
        return lines.reshape(-1)[offset : offset + self.scores.numel()]


def row_piece_mask(piece: Piece, keep: int, group: ranks.Group = None) -> Tensor:
    """Bool (owned,): of every output row the `keep` largest, ties to the lower input; rows may be spread over ranks.

    The k-th largest key of all rows at once by bisection over its 32 bits: each round adds one count per row.
    """
    keys, first = piece.block()
    along = 0 if piece.transposed else 1
    outputs = piece.shape[1] if piece.transposed else piece.shape[0]

    def everywhere(counts: Tensor) -> Tensor:
        """Counts of the local lines as counts of all output rows, (outputs,), not yet added over ranks."""
        if piece.transposed:
            return counts
        spread = torch.zeros(outputs, dtype=counts.dtype, device=counts.device)
        spread[first : first + len(counts)] = counts
        return spread

    def local(per_row: Tensor) -> Tensor:
        """(outputs,) as something that broadcasts against `keys`."""
        return per_row.unsqueeze(0) if piece.transposed else per_row[first : first + len(keys)].unsqueeze(1)

    if keep >= (piece.shape[0] if piece.transposed else piece.shape[1]):
        return torch.ones_like(piece.scores, dtype=torch.bool)
    threshold = torch.full((outputs,), _LEAST, dtype=torch.int64, device=keys.device)
    for bit in range(31, -1, -1):
        candidate = threshold + (1 << bit)
        counts = (keys >= local(candidate).int()).sum(along)
        reached = ranks.total(everywhere(counts), group) >= keep
        threshold = torch.where(reached, candidate, threshold)
    edge = local(threshold).int()
    mask, equal = keys > edge, keys == edge
    above = ranks.total(everywhere(mask.sum(along)), group)
    at = ranks.gathered(everywhere(equal.sum(along)), group)
    needed = keep - above - (at.cumsum(0) - at)[ranks.rank(group)]
    mask |= equal & (equal.cumsum(along, dtype=torch.int32) <= local(needed))
    return piece.cut_from(mask, first)


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Per output row of `scores` (out, in): the same number kept in each; ties to the lower index."""
    keep = kept_count(scores.shape[1], sparsity)
    lines = max(1, _CHUNK // scores.shape[1])
    parts = [
        row_piece_mask(Piece(part.reshape(-1), 0, tuple(part.shape)), keep).view(part.shape)
        for part in scores.split(lines)
    ]
    return torch.cat(parts)


def _best_of_groups(groups: Tensor, n: int) -> Tensor:
    """Bool (..., m): the `n` largest of each group along the last dimension, ties to the lower index."""
    columns = ordered_keys(groups).unbind(-1)
    kept = []
    for i, own in enumerate(columns):
        better = torch.zeros_like(own, dtype=torch.uint8)
        for j, other in enumerate(columns):
            if j != i:
                better += other >= own if j < i else other > own
        kept.append(better < n)
    return torch.stack(kept, -1)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Of every `m` consecutive inputs in a row of `scores` (out, in), the `n` largest are kept.

    Raises ValueError if the number of inputs is no multiple of m.
    """
    rows, columns = scores.shape
    if columns % m:
        raise ValueError(f"pattern {n}:{m} needs a number of inputs divisible by {m}, not {columns}")
    lines = max(1, _CHUNK // columns)
    parts = [_best_of_groups(part.reshape(len(part), columns // m, m), n) for part in scores.split(lines)]
    return torch.cat(parts).view(rows, columns)


def nm_piece_mask(piece: Piece, n: int, m: int, group: ranks.Group = None) -> Tensor:
    """`nm_mask` of what this rank owns, bool (owned,); only groups that a shard boundary cuts are exchanged.

    A stretch of the parameter that holds whole groups only is `m` inputs long, or `m` lines where the inputs are
    the parameter's first dimension.
    """
    stretch = m * (piece.shape[1] if piece.transposed else 1)
    begin, end = piece.start, piece.start + piece.scores.numel()
    bounds = ranks.gathered(torch.tensor([begin, end], device=piece.scores.device), group).reshape(-1).tolist()
    cut = sorted({bound // stretch for bound in bounds if bound % stretch})
    scores = piece.scores.float()
    shared = torch.zeros(len(cut), stretch, device=scores.device)
    for row, number in zip(shared, cut):
        low, high = max(begin, number * stretch), min(end, (number + 1) * stretch)
        if low < high:
            row[low - number * stretch : high - number * stretch] = scores[low - begin : high - begin]
    shared = ranks.total(shared, group)
    mask = torch.empty_like(scores, dtype=torch.bool)
    first, last = -(-begin // stretch) * stretch, end // stretch * stretch
    if first < last:
        mask[first - begin : last - begin] = _stretches(scores[first - begin : last - begin], stretch, n, m)
    for number, whole in zip(cut, shared):
        low, high = max(begin, number * stretch), min(end, (number + 1) * stretch)
        if low < high:
            kept = _stretches(whole, stretch, n, m)
            mask[low - begin : high - begin] = kept[low - number * stretch : high - number * stretch]
    return mask


def _stretches(scores: Tensor, stretch: int, n: int, m: int) -> Tensor:
    groups = scores.view(-1, m, stretch // m).transpose(1, 2)
    return _best_of_groups(groups, n).transpose(1, 2).reshape(-1)


def matrix_mask(
    scores: Tensor, sparsity: float, group: tuple[int, int] | None = None, by_row: bool = False
) -> Tensor:
    """Mask of one matrix (out, in): the exact count over the whole matrix or in each output row, or the N:M `group`."""
    if group:
        return nm_mask(scores, *group)
    return row_mask(scores, sparsity) if by_row else keep_mask(scores, kept_count(scores.numel(), sparsity))


# ---------------------------------------------------------------------- one budget for all matrices


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
    for chunk in _chunks([flat]):
        steps += (chunk.float() / largest.clamp_min(1e-38) * (1 << 30)).to(torch.int64).sum()
    return float(ranks.total(steps, group)) / (1 << 30) / numel * float(largest)


def _own_masks(parts: list[Tensor], keeps: list[int], group: ranks.Group) -> list[Tensor]:
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
            sum((torch.count_nonzero(compare(chunk, edge)) for chunk in _chunks([own])), zero)
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
    return [_packed(part, Cut(value_of(key, part.dtype), needed, level), own) for part, key, own, level, needed in rows]


def global_packed_masks(
    parts: list[Tensor], sizes: list[int], sparsity: float, floor: float = 0.25, group: ranks.Group = None
) -> list[Tensor]:
    """One threshold over all matrices, after each is divided by its mean; a floor per matrix. Packed bits.

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
    reserved = _own_masks([part.view(-1) for part in parts], floors, group)
    for part, held in zip(parts, reserved):  # what the floor holds is out of the race for the rest
        part.view(-1).masked_fill_(unpack_bits(held, (part.numel(),)), float("-inf"))
    rest = packed_masks(parts, keep - sum(floors), group)
    return [first | second for first, second in zip(reserved, rest)]


def global_masks(scores: list[Tensor], sparsity: float, floor: float = 0.25) -> list[Tensor]:
    """`global_packed_masks` of whole matrices as bool masks; `scores` stay as they are."""
    copies = [score.float().clone() for score in scores]
    packed = global_packed_masks(copies, [score.numel() for score in scores], sparsity, floor)
    return [unpack_bits(bits, score.shape) for bits, score in zip(packed, scores)]
