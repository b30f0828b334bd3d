"""Masks within one matrix: the same number in each output row, N of every M inputs, or an exact count."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engines import ranks
from .keys import ordered_keys
from .largest import keep_mask
from .threshold import CHUNK, kept_count

_LEAST = -(1 << 31)  # below the key of -inf


@dataclass(frozen=True)
class OwnedScores:
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
        """The owned range as whole lines of the parameter, int32 keys (lines, columns), and the first line's number.

        Where another rank owns a part of the first or last line, the least key stands.
        """
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


def row_mask_of_owned(piece: OwnedScores, keep: int, group: ranks.Group = None) -> Tensor:
    """The `keep` largest of every output row, ties to the lower input, of what this rank owns: bool (owned,).

    Rows may be spread over ranks. The k-th largest key of all rows at once by bisection over its 32 bits: each round
    adds one count per row.
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
    lines = max(1, CHUNK // scores.shape[1])
    parts = [
        row_mask_of_owned(OwnedScores(part.reshape(-1), 0, tuple(part.shape)), keep).view(part.shape)
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
    lines = max(1, CHUNK // columns)
    parts = [_best_of_groups(part.reshape(len(part), columns // m, m), n) for part in scores.split(lines)]
    return torch.cat(parts).view(rows, columns)


def nm_mask_of_owned(piece: OwnedScores, n: int, m: int, group: ranks.Group = None) -> Tensor:
    """`nm_mask` of what this rank owns, bool (owned,); ranks exchange only the groups of M that a boundary cuts.

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
