"""MAMA's layer problem: the mask and the values that replace what it prunes, found together.

min over W' of ‖X W'ᵀ − Y‖² with a given number of non-zeros, by ADMM: one copy of the weights solves the quadratic, one
is sparse, and a penalty that grows holds them together (as in ALPS, arXiv 2406.07831): soft at first, so that the mask
follows what inputs can do for one another, stiff in the end, so that it settles. Then conjugate gradients on that mask.
Three things are MAMA's own:

- Connections compete by what it costs to lose one while others make up for it (`stand_in`), not by |w| ‖x‖: an input
  that no other can replace is kept longer.
- Twenty over-relaxed iterations with five penalties, a factor for each, in place of hundreds.
- Goals other than the dense weight's outputs, and a check at the end: no row is worse than dropping its connections.
"""

import logging
from typing import Optional

import torch
from torch import Tensor

from ..selection.patterns import matrix_mask
from ..selection.threshold import kept_count
from .redistribution import conjugate_gradients, normal_equations, safer_rows, unit_diagonal

logger = logging.getLogger(__name__)
PENALTIES = (0.1, 0.39, 0.68, 1.04, 1.5)  # steep at first: 15 times the first one at the end, by √(stage)
PER_PENALTY = 4
RELAXATION = 1.5
REFIT = 3  # steps of conjugate gradients; the last, stiff iterations are a close start
DAMPING = 1e-2  # of the unit diagonal, towards the dense weight
FEWER = 0.08  # how fast inputs that can make up for a pruned one grow fewer with sparsity; see `stand_in`


def mama(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    group: Optional[tuple[int, int]] = None,
    importance: Optional[Tensor] = None,
    cross: Optional[Tensor] = None,
    by_row: bool = False,
) -> tuple[Tensor, Tensor]:
    """Mask and least-squares redistribution together.

    Args:
        weight: W, fp32 (out, in).
        gram: Xᵀ X, fp32 (in, in).
        sparsity: pruned share of the matrix, exact.
        group: (N, M) pattern or None.
        importance: (out, in) > 0, multiplies the score |w| ‖x‖ by which connections compete; None = that score with
            the inputs weighed by `stand_in`.
        cross: Yᵀ X, fp32 (out, in) of the wanted outputs; None = the outputs of `weight`.
        by_row: the same number kept in each output row, instead of where the matrix needs them.

    Returns:
        (new weight (out, in), bool mask (out, in)). No row has a higher layer error than W on the same mask.
    """
    matrix, scale = unit_diagonal(gram, DAMPING)
    goal = normal_equations(weight, matrix, scale, DAMPING, cross)
    if importance is None:
        worth = stand_in(matrix, 1 - group[0] / group[1] if group else sparsity)
        matrix.div_(worth).div_(worth.unsqueeze(1))
        goal, scale = goal.div_(worth), scale * worth
    wish = _search(matrix, goal, weight * scale, sparsity, group, importance, by_row, fresh=cross is not None)
    mask = matrix_mask(_scores(wish, importance), sparsity, group, by_row)
    sparse = conjugate_gradients(matrix, goal, mask, wish * mask, REFIT)
    return safer_rows(weight, sparse / scale * mask, weight * mask, gram, cross), mask


def stand_in(scaled: Tensor, sparsity: float) -> Tensor:
    """How little of each input the others can stand in for, in (0, 1], as a factor on |w| ‖x‖.

    Taking out one connection and refitting all others costs w² / (A⁻¹)_jj (optimal brain surgeon, SparseGPT), which
    counts on others that are going to be pruned as well. A ridge on A takes such a share of their help away: of inputs
    kept with probability 1 − s it grows like s / (1 − s).

    Args:
        scaled: gram of unit diagonal, (in, in).
    """
    if sparsity == 1:  # a budget may leave nothing of a matrix, and so nobody to stand in
        return torch.ones_like(scaled.diagonal())
    ridge = FEWER * sparsity / (1 - sparsity)
    inverse, taken = _inverse(scaled, ridge)
    return (inverse.diagonal() * (scaled.diagonal() + taken)).clamp_min(1.0).rsqrt()


def _search(
    matrix: Tensor,
    goal: Tensor,
    dense: Tensor,
    sparsity: float,
    group: Optional[tuple[int, int]],
    importance: Optional[Tensor],
    by_row: bool,
    fresh: bool,
) -> Tensor:
    """ADMM for W A = B (out, in) with the wanted number of non-zeros, up to the last choice of the mask.

    `fresh` says that `dense` is not yet the solution without a mask, since other outputs than its own are wanted.

    Returns:
        (out, in), whose largest connections are to be kept, with values near their best.
    """
    keep = kept_count(dense.numel(), sparsity)
    sparse = wish = dense
    dual = torch.zeros_like(dense)  # of the constraint that both copies are equal
    for stage, penalty in enumerate(PENALTIES):
        inverse, penalty = _inverse(matrix, penalty)
        for step in range(PER_PENALTY):
            first = stage == step == 0
            current = dense if first and not fresh else (goal - dual + penalty * sparse) @ inverse
            wish = current if first else torch.lerp(sparse, current, RELAXATION)
            wish = wish + dual / penalty
            if stage == len(PENALTIES) - 1 and step == PER_PENALTY - 1:
                break
            scores = _scores(wish, importance)
            exact = group is not None or by_row
            mask = matrix_mask(scores, sparsity, group, by_row) if exact else _roughly(scores, keep)
            sparse = wish * mask
            dual = penalty * (wish - sparse)
    return wish


def _scores(wish: Tensor, importance: Optional[Tensor]) -> Tensor:
    """By what the connections of a solution compete, (out, in)."""
    return wish.abs() if importance is None else wish.abs() * importance


def _inverse(matrix: Tensor, ridge: float) -> tuple[Tensor, float]:
    """(A + ρ I)⁻¹ and the ρ it took: ten times more each time a gram is too far from positive definite for it."""
    while ridge < 1e6:
        shifted = matrix.clone()
        shifted.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            return torch.cholesky_inverse(factor), ridge
        logger.info("gram is not positive definite at penalty %g: ten times more is used", ridge)
        ridge = max(10 * ridge, 1e-3)
    raise FloatingPointError("the gram holds NaN or infinity")


def _roughly(scores: Tensor, keep: int) -> Tensor:
    """Mask of about `keep` largest scores >= 0: exact to one part in 128 of a score's value, at a third of the cost.

    While the mask still moves from one iteration to the next its exact count does not matter.
    """
    bits = scores.view(torch.int32) >> 16  # sign 0, exponent, seven bits of the mantissa: ordered as the scores are
    reached = torch.bincount(bits.reshape(-1), minlength=1 << 15).flip(0).cumsum(0)
    position = int(torch.searchsorted(reached, keep))
    return bits >= (1 << 15) - 1 - min(position, (1 << 15) - 1)
