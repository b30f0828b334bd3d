"""Wanda (Sun et al., arXiv 2306.11695): |w_ij| ‖x_j‖, compared within each output row, weights unchanged."""

from torch import Tensor

from ..indicators.formulas import activation
from ..selection.patterns import nm_mask, row_mask


def wanda(
    weight: Tensor, input_norm: Tensor, sparsity: float, group: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """`weight` (out, in) fp32, `input_norm` (in,); `group` (N, M) or None. Returns (pruned weight, bool mask).

    Each row loses int(in · sparsity) connections, truncated as in the authors' code: where that is not a whole number
    the matrix keeps up to one connection a row more than asked.
    """
    scores = activation(weight, input_norm)
    if group:
        mask = nm_mask(scores, *group)
    else:
        columns = weight.shape[1]
        mask = row_mask(scores, int(columns * sparsity) / columns)
    return weight * mask, mask
