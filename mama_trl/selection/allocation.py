"""How the total sparsity is shared among matrices: the allocation (the option `budget`)."""

from typing import Optional

from torch import Tensor

from ..engines import ranks
from .threshold import find_threshold, kept_count, kept_counts


def uniform(sizes: list[int], sparsity: float) -> list[float]:
    return [sparsity] * len(sizes)


def global_densities(
    scores: list[Tensor], sparsity: float, sizes: Optional[list[int]] = None, group: ranks.Group = None
) -> list[float]:
    """Kept share of each matrix under one threshold on the scores of all.

    Args:
        scores: of each matrix, any shape, one dtype; with a `group` what this rank owns of it.
        sizes: connections of each whole matrix; default those of `scores`.
    """
    sizes = sizes if sizes is not None else [score.numel() for score in scores]
    keep = kept_count(sum(sizes), sparsity)
    if keep >= sum(sizes):
        return [1.0] * len(sizes)
    kept = kept_counts(scores, find_threshold(scores, keep, group), group)
    return [count / size for count, size in zip(kept, sizes)]


def blended(
    sizes: list[int], densities: list[float], sparsity: float, blend: float, floor: float = 0.1
) -> list[float]:
    """Sparsity per matrix: `blend` of `densities`, the rest uniform, with the exact total kept.

    Args:
        sizes: connections per matrix.
        densities: kept share per matrix, to be blended with the uniform one.
        sparsity: overall sparsity.
        blend: 0 uniform, 1 the indicator's own.
        floor: least density, as a share of the overall one, so that no layer starves.

    Returns:
        Sparsities s with Σ kept_count(size, s) equal to kept_count(Σ size, sparsity).
    """
    target = kept_count(sum(sizes), sparsity)
    overall = target / sum(sizes)
    wanted = [(1 - blend) * overall + blend * density for density in densities]
    low = [max(1, round(floor * overall * size)) for size in sizes]
    # Scale what is above the floor until the total fits; a matrix can be full.
    left, right = 0.0, max(1.0 / max(min(wanted), 1e-9), 1.0) * 2
    for _ in range(100):
        middle = (left + right) / 2
        total = sum(_count(w * middle, s, f) for w, s, f in zip(wanted, sizes, low))
        left, right = (middle, right) if total < target else (left, middle)
    counts = [_count(w * right, s, f) for w, s, f in zip(wanted, sizes, low)]
    # Rounding leaves a few too many: take them from the matrices with the most room above the floor.
    while sum(counts) > target:
        index = max(range(len(counts)), key=lambda i: (counts[i] - low[i], -i))
        counts[index] -= min(sum(counts) - target, max(1, (counts[index] - low[index]) // 4))
    while sum(counts) < target:
        index = max(range(len(counts)), key=lambda i: (sizes[i] - counts[i], -i))
        counts[index] += 1
    return [1 - count / size for count, size in zip(counts, sizes)]


def _count(density: float, size: int, floor: int) -> int:
    return max(floor, min(size, round(density * size)))


def allocate(
    scores: list[Tensor], sizes: list[int], sparsity: float, blend: float, group: ranks.Group = None
) -> list[float]:
    """Shares the sparsity among matrices: `blend` as a global threshold on the scores would, the rest uniformly.

    The number of kept connections is that of a uniform allocation.

    Args:
        scores: of each matrix, any shape, one dtype; with a `group` what this rank owns of it.
        sizes: connections of each whole matrix.
    """
    if blend == 0:
        return uniform(sizes, sparsity)
    return blended(sizes, global_densities(scores, sparsity, sizes, group), sparsity, blend)
