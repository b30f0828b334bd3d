"""Moving what pruned connections carried to the kept ones. Pure functions; weights are (out, in).

The best kept weights solve min over W' supported on the mask of ‖X (W − W')ᵀ‖², for which the gram Xᵀ X is
all that is needed.
"""

from typing import Callable, Optional

import torch
from torch import Tensor

from ..indicators.formulas import Inputs


def unit_diagonal(gram: Tensor, damping: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Scales a gram to unit diagonal and damps it.

    Args:
        gram: fp32 (in, in), positive semi-definite.
        damping: added to the unit diagonal.

    Returns:
        (scaled gram (in, in), scale (in,)) with gram ≈ scale ⊗ scale * scaled. An input that is always zero
        gets the smallest scale of the living ones, so that nothing is divided by zero.
    """
    diagonal = gram.diagonal().clamp_min(0)
    alive = diagonal > diagonal.max() * 1e-12
    smallest = torch.where(alive, diagonal, diagonal.max()).min()
    scale = torch.where(alive, diagonal, smallest.clamp_min(1e-30)).sqrt()
    scaled = gram / scale.outer(scale)
    # Correlations: beyond 1 there is only rounding, such as a small variance beside a large mean leaves.
    scaled = torch.nan_to_num(scaled).clamp_(-1.0, 1.0)
    scaled.diagonal().copy_(torch.ones_like(scale) + damping)
    return scaled, scale


def least_squares(
    weight: Tensor,
    gram: Tensor,
    mask: Tensor,
    start: Tensor | None = None,
    steps: int = 40,
    damping: float = 1e-4,
    cross: Tensor | None = None,
) -> Tensor:
    """Kept weights that lose least, by conjugate gradients projected on the mask, all rows at once.

    Args:
        weight: dense weights W, fp32 (out, in).
        gram: Xᵀ X, fp32 (in, in).
        mask: bool (out, in), True = kept.
        start: first guess; default W on the mask.
        steps: iterations; each costs one (out, in) × (in, in) product.
        damping: on the unit-diagonal gram, towards `weight`.
        cross: Yᵀ X (out, in) of the wanted outputs Y; default those of W, which is W Xᵀ X.

    Returns:
        W' (out, in), zero where the mask is. Never worse than `start` in damped layer error.
    """
    scaled, scale = unit_diagonal(gram, damping)
    guess = (weight if start is None else start) * scale * mask
    goal = normal_equations(weight, scaled, scale, damping, cross)
    return conjugate_gradients(scaled, goal, mask, guess, steps) / scale * mask


def normal_equations(weight: Tensor, scaled: Tensor, scale: Tensor, damping: float, cross: Tensor | None) -> Tensor:
    """Right side B (out, in) of W' A = B in unit-diagonal space, A = `scaled` with its damping towards `weight`."""
    dense = weight * scale
    return dense @ scaled if cross is None else torch.nan_to_num(cross / scale) + damping * dense


def conjugate_gradients(matrix: Tensor, goal: Tensor, mask: Tensor, guess: Tensor, steps: int) -> Tensor:
    """Solves (W A)[mask] = B[mask] for W supported on `mask`, each row by itself.

    Args:
        matrix: A, symmetric positive definite (in, in).
        goal: B (out, in).
        guess: start (out, in), zero outside the mask.
    """
    guess = guess.clone()
    residual = (goal - guess @ matrix) * mask
    direction = residual.clone()
    square = residual.square().sum(1, keepdim=True)
    for _ in range(steps):
        product = direction @ matrix * mask
        curve = (direction * product).sum(1, keepdim=True)
        step = torch.where(curve > 0, square / curve.clamp_min(1e-30), torch.zeros_like(curve))
        guess += step * direction
        residual -= step * product
        fresh = residual.square().sum(1, keepdim=True)
        turn = torch.where(square > 0, fresh / square.clamp_min(1e-30), torch.zeros_like(square))
        direction = residual + turn * direction
        square = fresh
    return guess


def mean(weight: Tensor, mask: Tensor) -> Tensor:
    """The paper's rule done right: each row's pruned sum is spread evenly over its kept connections.

    The published code zeroes the pruned values before it sums them, so that it moves nothing; here the sum is
    taken first. `weight` (out, in), `mask` bool (out, in).
    """
    moved = (weight * ~mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    return (weight + moved) * mask


def bias_shift(weight: Tensor, kept: Tensor, input_mean: Tensor) -> Tensor:
    """What the bias must gain so that the mean output stays: (W − W') x̄, (out,)."""
    return (weight - kept) @ input_mean


def layer_error(weight: Tensor, kept: Tensor, gram: Tensor) -> Tensor:
    """‖X (W − W')ᵀ‖² per row, (out,)."""
    difference = weight - kept
    return ((difference @ gram) * difference).sum(1)


# Where pruned values go once a mask is chosen: (weight, mask, inputs) to (kept weight, what the bias gains or None).
# `least_squares` is not among them: mama.py finds mask and values together.
MOVES: dict[str, Callable[[Tensor, Tensor, Inputs], tuple[Tensor, Optional[Tensor]]]] = {
    "none": lambda weight, mask, inputs: (weight * mask, None),
    "mean": lambda weight, mask, inputs: (mean(weight, mask), None),
    "bias": lambda weight, mask, inputs: (weight * mask, bias_shift(weight, weight * mask, inputs.mean)),
}
