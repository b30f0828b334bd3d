"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): columns from left to right, each pruned value's error
compensated in the columns to the right; the mask is chosen block by block of 128 columns."""

import logging

import torch
from torch import Tensor

from ..selection import keep_mask, kept_count, nm_mask

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
        damped = gram + torch.eye(gram.shape[0], device=gram.device, dtype=gram.dtype) * damping * mean
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
    """`weight` (out, in) and `gram` (in, in) fp32; `group` (N, M) or None. Returns (new weight, bool mask)."""
    weight = weight.clone()
    columns = weight.shape[1]
    weight[:, gram.diagonal() == 0] = 0
    upper = inverse_factor(gram)
    mask = torch.ones_like(weight, dtype=torch.bool)
    keep = 0
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        local = weight[:, start:end].clone()
        errors = torch.zeros_like(local)
        factor = upper[start:end, start:end]
        diagonal = factor.diagonal()
        if group is None:
            # Exactly the overall count: each block takes what is still owed.
            owed = kept_count(weight.shape[0] * end, sparsity) - keep
            chosen = keep_mask(local.square() / diagonal.square(), owed)
            keep += int(chosen.sum())
            mask[:, start:end] = chosen
        for column in range(end - start):
            if group and (start + column) % group[1] == 0:
                inside = slice(column, column + group[1])
                scores = local[:, inside].square() / diagonal[inside].square()
                mask[:, start + column : start + column + group[1]] = nm_mask(scores, *group)
            kept = mask[:, start + column]
            value = local[:, column]
            error = value * ~kept / diagonal[column]
            local[:, column:] -= error.unsqueeze(1) * factor[column, column:]
            local[:, column] = value * kept
            errors[:, column] = error
        weight[:, start:end] = local
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight * mask, mask
