"""Exchanges of kept for pruned connections that lower a layer's error on its gram.

With kept values W' at their optimum on the mask and R = B − W' A the residual of the normal equations (zero on the
mask), taking connection j in alone lowers ½ tr(W' A W'ᵀ) − tr(W' Bᵀ) by R_j² / 2 A_jj, and taking kept connection i out
alone raises it by at least w_i² / 2 (A⁻¹)_ii; with unit diagonal |R_j| and |w_i| are on one scale. The m best newcomers
replace the m weakest, the values are refitted, and what does not lower the error is undone.
"""

from typing import Optional

import torch
from torch import Tensor

from ..selection.patterns import matrix_mask
from .redistribution import conjugate_gradients

ROUNDS = 3
REFIT = 6


def objective(matrix: Tensor, goal: Tensor, values: Tensor) -> Tensor:
    """½ w A wᵀ − w bᵀ of each row, (out,): the layer's squared error up to a factor and a constant."""
    return ((values @ matrix) * values).sum(1) / 2 - (values * goal).sum(1)


def exchange(
    matrix: Tensor,
    goal: Tensor,
    values: Tensor,
    mask: Tensor,
    group: Optional[tuple[int, int]] = None,
    by_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """Better support with the same count, and its refitted values.

    Args:
        matrix: A, unit diagonal but for its damping, (in, in).
        goal: B (out, in).
        values: kept values near their optimum on `mask`, (out, in).
        mask: bool (out, in).
        group: (N, M), kept within each group; None = the count of the whole matrix.
        by_row: the count of each row stays, which is the same in all.

    Returns:
        (values, mask); the error is never higher than before.
    """
    sparsity = 1.0 - int(mask.sum()) / mask.numel()
    error = objective(matrix, goal, values).sum()
    for _ in range(ROUNDS):
        residual = goal - values @ matrix
        score = torch.where(mask, values.abs(), residual.abs())
        new = matrix_mask(score, sparsity, group, by_row)
        start = torch.where(mask, values, residual) * new
        fitted = conjugate_gradients(matrix, goal, new, start, REFIT)
        better = objective(matrix, goal, fitted).sum()
        if not better < error:
            break
        values, mask, error = fitted, new, better
    return values, mask
