"""Indicator to mask: keep exactly k connections, ties to the lower position, without a full sort.

The score of the k-th largest is found by a radix select over the bit pattern of the fp32 scores (a
histogram of the upper 16 bits, then one of the lower 16 bits within the chosen bin); everything above it
is kept, and of those equal to it the first ones by position. Masks are bool, True = kept.
"""

import torch
from torch import Tensor

_BINS = 1 << 16
_CHUNK = 1 << 21  # scores handled at once: bounds the extra memory


def _ordered_bits(scores: Tensor) -> Tensor:
    """Maps fp32 to int64 in [0, 2^32) such that integer order is numeric order; -0.0 counts as 0.0."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)
    # Positive floats order as their bits; negative ones order backwards, below all positive ones.
    return torch.where(bits < 0, (1 << 31) - 1 - (bits & 0x7FFFFFFF), bits + (1 << 31))


def threshold(scores: Tensor, keep: int) -> tuple[float, int]:
    """The k-th largest score and how many scores equal to it are kept.

    Args:
        scores: any shape; converted to fp32 chunk by chunk; must be free of NaN.
        keep: how many to keep, 1 <= keep <= number of scores.

    Returns:
        (value, ties): keep all scores > value and the first `ties` of those == value.
    """
    flat = scores.reshape(-1)
    upper = torch.zeros(_BINS, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        upper += torch.bincount(_ordered_bits(chunk.float()) >> 16, minlength=_BINS)
    high, rest = _bin_of(upper, keep)
    lower = torch.zeros(_BINS, dtype=torch.int64, device=flat.device)
    for chunk in flat.split(_CHUNK):
        bits = _ordered_bits(chunk.float())
        lower += torch.bincount(bits[(bits >> 16) == high] & (_BINS - 1), minlength=_BINS)
    low, ties = _bin_of(lower, rest)
    return _unfold((high << 16) | low), ties


def _bin_of(histogram: Tensor, keep: int) -> tuple[int, int]:
    """Highest bin at which `keep` scores are reached from above, and how many of its own are needed."""
    from_above = histogram.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_above, keep))
    above = int(from_above[position - 1]) if position else 0
    return _BINS - 1 - position, keep - above


def _unfold(key: int) -> float:
    """Inverse of `_ordered_bits` for one key."""
    bits = key - (1 << 31) if key >= (1 << 31) else ((1 << 31) - 1 - key) - (1 << 31)
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32).item()


def keep_mask(scores: Tensor, keep: int) -> Tensor:
    """Bool mask, shape of `scores`, True at exactly `keep` largest scores; ties to the lower flat index."""
    if keep <= 0:
        return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    if keep >= scores.numel():
        return torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    value, ties = threshold(scores, keep)
    flat = scores.reshape(-1).float()
    mask = flat > value
    equal = (flat == value).nonzero().squeeze(1)
    mask[equal[:ties]] = True
    return mask.view(scores.shape)


def kept_count(numel: int, sparsity: float) -> int:
    """Connections kept of `numel` at `sparsity`, rounded half to even; at least one."""
    return max(1, numel - round(numel * sparsity))


def row_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Per output row of `scores` (out, in): the same number kept in each; ties to the lower index."""
    keep = kept_count(scores.shape[1], sparsity)
    order = scores.float().argsort(dim=1, descending=True, stable=True)[:, :keep]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, order, True)


def nm_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """Of every `m` consecutive inputs in a row of `scores` (out, in), the `n` largest are kept.

    Raises ValueError if the number of inputs is no multiple of m.
    """
    rows, columns = scores.shape
    if columns % m:
        raise ValueError(f"pattern {n}:{m} needs a number of inputs divisible by {m}, not {columns}")
    groups = scores.float().reshape(rows, columns // m, m)
    order = groups.argsort(dim=2, descending=True, stable=True)[..., :n]
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device).scatter_(2, order, True)
    return mask.view(rows, columns)


def global_masks(scores: list[Tensor], sparsity: float, floor: float = 0.25) -> list[Tensor]:
    """One threshold over all matrices, after each is divided by its mean; a floor per matrix.

    `floor` is the least density a matrix keeps, as a share of the overall density: a raw global threshold
    starves whole layers. Exactly `kept_count(total, sparsity)` connections are kept.
    """
    total = sum(score.numel() for score in scores)
    keep = kept_count(total, sparsity)
    floors = [int(floor * (1 - sparsity) * score.numel()) for score in scores]
    normal = torch.cat([score.reshape(-1).float() / score.float().mean().clamp_min(1e-30) for score in scores])
    parts = normal.split([score.numel() for score in scores])
    masks = [keep_mask(part, count) for part, count in zip(parts, floors)]
    reserved = torch.cat(masks)
    # What the floors hold is out of the race for the rest.
    rest = keep_mask(normal.masked_fill(reserved, float("-inf")), keep - sum(floors)) | reserved
    return [mask.view(score.shape) for mask, score in zip(rest.split([s.numel() for s in scores]), scores)]


def matrix_mask(scores: Tensor, sparsity: float, group: tuple[int, int] | None = None) -> Tensor:
    """Mask of one matrix (out, in): the exact count over the whole matrix, or the N:M `group`."""
    return nm_mask(scores, *group) if group else keep_mask(scores, kept_count(scores.numel(), sparsity))
