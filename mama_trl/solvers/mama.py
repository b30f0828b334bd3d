"""MAMA's layer problem: mask and redistributed values found together, then exchanges and an exact refit.

min over W' of ‖X W'ᵀ − Y‖² with a given number of non-zeros, on the unit-diagonal gram, in three steps:

1. ADMM with the mask chosen along a cubic ramp (after Boža, arXiv 2401.02938);
2. exchanges of kept for pruned connections that lower the error (exchange.py);
3. conjugate gradients on the support that came out.
"""

import logging
from typing import Optional

import torch
from torch import Tensor

from ..selection.patterns import matrix_mask
from ..selection.threshold import kept_count
from .exchange import exchange
from .redistribution import conjugate_gradients, normal_equations, unit_diagonal

logger = logging.getLogger(__name__)
ITERATIONS = 20
RAMP = 15  # iterations over which the sparsity rises to its target
REFIT = 15  # steps of conjugate gradients; the ADMM solution is a close start
DAMPING = 1e-2  # while the mask is looked for
REFIT_DAMPING = 1e-3


def mama(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    group: Optional[tuple[int, int]] = None,
    importance: Optional[Tensor] = None,
    penalty: float = 1.0,
    cross: Optional[Tensor] = None,
    exchanges: bool = True,
    by_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mask and least-squares redistribution together.

    Args:
        weight: W, fp32 (out, in).
        gram: Xᵀ X, fp32 (in, in).
        sparsity: pruned share of the matrix, exact.
        group: (N, M) pattern or None.
        importance: (out, in) > 0, multiplies the projection's score |w| ‖x‖; None = activation alone.
        penalty: ADMM's ρ on the unit-diagonal gram.
        cross: Yᵀ X, fp32 (out, in) of the wanted outputs; None = the outputs of `weight`.
        exchanges: whether the mask may still be improved after ADMM; only where `importance` is None, since exchanges
            know nothing but the layer's error.
        by_row: the same number kept in each output row, instead of where the matrix needs them.

    Returns:
        (new weight (out, in), bool mask (out, in)).
    """
    scaled, scale = unit_diagonal(gram, DAMPING)
    goal = normal_equations(weight, scaled, scale, DAMPING, cross)
    inverse, penalty = _inverse(scaled, penalty)  # computed once and reused in every iteration
    dense = weight * scale
    current = dense if cross is None else (goal + penalty * dense) @ inverse
    dual = torch.zeros_like(dense)
    for iteration in range(1, ITERATIONS + 1):
        ramp = 1.0 - (1.0 - min(iteration / RAMP, 1.0)) ** 3
        wish = current + dual
        score = wish.abs() if importance is None else wish.abs() * importance
        if iteration < ITERATIONS and group is None and not by_row:
            mask = _roughly(score, kept_count(score.numel(), sparsity * ramp))
        else:
            mask = matrix_mask(score, sparsity * ramp, group, by_row)  # the ramp has ended by the last iteration
        sparse = wish * mask
        dual = wish - sparse
        if iteration < ITERATIONS:
            current = (goal + penalty * (sparse - dual)) @ inverse
    scaled.diagonal().sub_(DAMPING - REFIT_DAMPING)
    goal = normal_equations(weight, scaled, scale, REFIT_DAMPING, cross)
    sparse = conjugate_gradients(scaled, goal, mask, sparse, REFIT)
    if exchanges and importance is None:
        sparse, mask = exchange(scaled, goal, sparse, mask, group, by_row)
    return sparse / scale * mask, mask


def _inverse(scaled: Tensor, penalty: float) -> tuple[Tensor, float]:
    """(A + ρ I)⁻¹ and the ρ it took: ten times more each time a gram is too far from positive definite for it."""
    while True:
        shifted = scaled.clone()
        shifted.diagonal().add_(penalty)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return torch.cholesky_inverse(factor), penalty
        logger.info("gram is not positive definite at penalty %g: ten times more is used", penalty)
        penalty *= 10


def _roughly(scores: Tensor, keep: int) -> Tensor:
    """Mask of about `keep` largest scores >= 0: exact to one part in 128 of a score's value, at a third of the cost.

    While the mask still moves from one iteration to the next its exact count does not matter.
    """
    bits = scores.view(torch.int32) >> 16  # sign 0, exponent, seven bits of the mantissa: ordered as the scores are
    reached = torch.bincount(bits.reshape(-1), minlength=1 << 15).flip(0).cumsum(0)
    position = int(torch.searchsorted(reached, keep))
    return bits >= (1 << 15) - 1 - min(position, (1 << 15) - 1)
