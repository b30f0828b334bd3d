"""Magnitude pruning: the smallest |w| of each matrix go."""

from torch import Tensor

from ..selection.patterns import matrix_mask


def magnitude(weight: Tensor, sparsity: float, group: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    """`weight` (out, in) fp32; `group` (N, M) or None. Returns (pruned weight, bool mask)."""
    mask = matrix_mask(weight.abs(), sparsity, group)
    return weight * mask, mask
