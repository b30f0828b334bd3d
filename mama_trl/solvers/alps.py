"""ALPS (Meng et al., arXiv 2406.07831): ADMM on the layer problem with a penalty that grows as the support settles,
then conjugate gradients on the fixed support."""

from typing import Optional

import torch
from torch import Tensor

from ..selection.patterns import matrix_mask
from .redistribution import conjugate_gradients

PENALTY = 0.1
EVERY = 3  # iterations between updates of the penalty
ITERATIONS = 300
REFIT = 10
DAMPING = 0.01  # of the mean diagonal
SOFTEST = 1e-6 * PENALTY  # where nearly everything is kept, no penalty moves the support


def next_penalty(penalty: float, changed: int, kept: int) -> float:
    """The paper's schedule: 1.3, 1.2 or 1.1 times the penalty by how many connections the support changed."""
    if changed >= 0.1 * kept:
        return penalty * 1.3
    if changed >= 0.005 * kept:
        return penalty * 1.2
    return penalty * 1.1 if changed >= 1 else penalty


def alps(
    weight: Tensor, gram: Tensor, sparsity: float, group: Optional[tuple[int, int]] = None
) -> tuple[Tensor, Tensor]:
    """`weight` (out, in) and `gram` (in, in) fp32; `group` (N, M) or None. Returns (new weight, bool mask).

    min ½‖X (W' − W)ᵀ‖² with at most k non-zeros, split into W' and D: W' solves the quadratic, D is the projection of
    W' + V/ρ by magnitude in the space where the gram has unit diagonal, V collects the difference. Every third
    iteration ρ grows by `next_penalty`; when the support has not changed since the last time, the loop ends.
    """
    gram = gram.clone()
    dead = gram.diagonal() <= 0
    gram.diagonal()[dead] = 1.0
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    scale = gram.diagonal().sqrt()
    gram = gram / scale.outer(scale)
    dense = weight * scale
    goal = dense @ gram
    # One eigendecomposition, so that a new penalty costs no new factor.
    values, vectors = torch.linalg.eigh(gram.double())

    def inverse(penalty: float) -> Tensor:
        return ((vectors / (values.clamp_min(0) + penalty)) @ vectors.t()).to(weight.dtype)

    penalty = PENALTY
    solve = inverse(penalty)
    support = matrix_mask(dense.abs(), sparsity, group)
    split = first = dense * support
    dual = torch.zeros_like(dense)
    grown = False
    for iteration in range(1, ITERATIONS + 1):
        current = (goal - dual + penalty * split) @ solve
        wish = current + dual / penalty
        mask = matrix_mask(wish.abs(), sparsity, group)
        split = wish * mask
        dual = dual + penalty * (current - split)
        if iteration % EVERY:
            continue
        changed, support = int((mask != support).sum()), mask
        if not grown and changed < 0.005 * int(mask.sum()) and penalty > SOFTEST:
            # The first support hardly moves: the penalty is too stiff, so the start is taken again with a softer one.
            penalty /= 5
            if changed:
                split, dual = first, torch.zeros_like(dense)
        elif changed == 0:
            break
        else:
            penalty, grown = min(next_penalty(penalty, changed, int(mask.sum())), 1e6), True
        solve = inverse(penalty)
    mask = matrix_mask(current.abs(), sparsity, group)
    new = conjugate_gradients(gram, goal, mask, current * mask, REFIT)
    return new / scale * mask, mask
