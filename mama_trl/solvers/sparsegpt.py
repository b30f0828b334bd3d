"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): columns from left to right, each pruned value's error
compensated in the columns to the right; the mask is chosen block by block of 128 columns."""

import logging

import torch
from torch import Tensor

from ..selection.largest import keep_mask
from ..selection.patterns import nm_mask
from ..selection.threshold import kept_count

logger = logging.getLogger(__name__)
BLOCK = 128
DAMPING = 0.01  # of the mean diagonal


def inverse_factor(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Upper Cholesky factor U of (gram + damping · mean diagonal)⁻¹ = Uᵀ U; damping grows until it exists."""
    gram = gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1.0
    mean = gram.diagonal().mean()
    for _ in range(12):
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(factor), upper=True)
            if not failed and torch.isfinite(upper).all():
                return upper
        logger.info("gram is not positive definite at damping %g: ten times more is used", damping)
        damping *= 10
    raise FloatingPointError("the gram holds NaN or infinity")


def sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, group: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """`weight` (out, in) and `gram` (in, in) fp32; `group` (N, M) or None. Returns (new weight, bool mask).

    Unstructured, each block of 128 columns is pruned to `sparsity` by itself, as in the authors' code, so that the
    matrix keeps the sum of the blocks' counts. The columns of a block are worked on as contiguous rows, and what
    earlier columns of the block still owe a column is fetched in one product when its turn comes (the same sums as
    the textbook's update of all later columns at once, in half the memory traffic).
    """
    columns = weight.shape[1]
    upper = inverse_factor(gram)
    rows = weight.t().contiguous()  # (in, out): a column of the weight is one contiguous row
    rows[gram.diagonal() == 0] = 0
    kept = torch.ones_like(rows, dtype=torch.bool)
    width = BLOCK if group is None else max(BLOCK // group[1], 1) * group[1]  # no group is cut in two
    for start in range(0, columns, width):
        end = min(start + width, columns)
        factor = upper[start:end, start:end].contiguous()
        diagonal = factor.diagonal().unsqueeze(1)
        values = rows[start:end]
        if group is None:
            scores = (values / diagonal).square()
            kept[start:end] = keep_mask(scores.t(), kept_count(scores.numel(), sparsity)).t()
        lost = (~kept[start:end]) / diagonal
        errors = torch.zeros_like(values)
        owed = factor.t().contiguous()  # row j: what each earlier error takes from column j
        for column in range(end - start):
            if group and (start + column) % group[1] == 0:
                # The pattern of the next M columns is chosen on values that all earlier columns have compensated.
                inside = slice(column, column + group[1])
                current = values[inside] - owed[inside, :column] @ errors[:column]
                chosen = nm_mask((current / diagonal[inside]).square().t(), *group).t()
                kept[start + column : start + column + group[1]] = chosen
                lost[inside] = (~chosen) / diagonal[inside]
            value = values[column]
            if column:
                value.addmv_(errors[:column].t(), owed[column, :column], alpha=-1)
            torch.mul(value, lost[column], out=errors[column])
        rows[end:].addmm_(upper[start:end, end:].t(), errors, alpha=-1)
    mask = kept.t().contiguous()
    return rows.t() * mask, mask
