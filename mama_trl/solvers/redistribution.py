"""Moving what pruned connections carried to the kept ones. Pure functions; weights are (out, in).

The best kept weights solve min over W' supported on the mask of ‖X (W − W')ᵀ‖², for which the gram Xᵀ X is
all that is needed.
"""

import logging
from typing import Callable, Optional

import torch
from torch import Tensor

from ..errors import warn_once
from ..indicators.formulas import Inputs

logger = logging.getLogger(__name__)
# Sums of up to a million squares, added up in fp32, are off by about 1e-6 of themselves; this is one power more.
ROUNDING = 1e-5


def unit_diagonal(gram: Tensor, damping: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Scales a gram to unit diagonal and damps it.

    An input that is never active counts for nothing and is held to its dense weights by the damping alone; its scale is
    a thousandth of the smallest living one, so that it is the first to go.

    Args:
        gram: fp32 (in, in), positive semi-definite.
        damping: added to the unit diagonal.

    Returns:
        (scaled gram (in, in), scale (in,)) with gram ≈ scale ⊗ scale * scaled.
    """
    diagonal = gram.diagonal().clamp_min(0)
    alive = ~(diagonal <= (diagonal.max() * 1e-12).clamp_min(1e-30))  # NaN stays, to be found by who selects
    smallest = torch.where(alive, diagonal, torch.inf).min()
    smallest = torch.where(torch.isfinite(smallest), smallest, 1e6)  # nothing is alive: any scale will do
    scale = torch.where(alive, diagonal, 1e-6 * smallest).sqrt()
    # Correlations: beyond 1 there is only rounding, such as a small variance beside a large mean leaves.
    scaled = torch.nan_to_num(gram / scale.outer(scale)).clamp_(-1.0, 1.0)
    scaled[~alive] = 0
    scaled[:, ~alive] = 0
    scaled.diagonal().copy_(alive.to(scale.dtype) + damping)
    return scaled, scale


def centred(gram: Tensor, total: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Gram of the deviations from the mean input, in which inputs that do not vary are exactly zero.

    The difference of two large numbers leaves rounding in the place of a constant's variance. Scaled to unit diagonal
    such noise looks like any other input, and weights of any size on it cost nothing. A bias has a constant's share
    already, so its row and column are set to zero: `unit_diagonal` then takes it for an input that is never active.

    Args:
        gram: Xᵀ X, fp32 (in, in), not centred.
        total: Σ x, (in,).
        tokens: rows of X.

    Returns:
        (centred gram (in, in), bool (in,) True = constant: a variance below fp32 rounding of the second moment).
    """
    result = gram - total.outer(total / max(tokens, 1))
    constant = result.diagonal() <= ROUNDING * gram.diagonal()
    result[constant] = 0
    result[:, constant] = 0
    return result, constant


def centred_cross(cross: Tensor, total: Tensor, wanted: Tensor, constant: Tensor) -> Tensor:
    """Σ (y − ȳ) xᵀ of the wanted outputs, for use beside `centred`: zero where an input is constant.

    Args:
        cross: Σ y xᵀ, fp32 (out, in).
        total: Σ x, (in,).
        wanted: the mean output ȳ, (out,), which the bias will hold.
        constant: bool (in,), from `centred`.
    """
    return (cross - wanted.outer(total)).masked_fill_(constant, 0)


def least_squares(
    weight: Tensor,
    gram: Tensor,
    mask: Tensor,
    start: Tensor | None = None,
    steps: int = 40,
    damping: float = 1e-4,
    cross: Tensor | None = None,
) -> Tensor:
    """Kept weights that lose least on a given mask, by conjugate gradients projected on it, all rows at once.

    Not what the option `redistribution="least_squares"` runs, which finds mask and values together (mama.py): this
    repairs the mask of any other method.

    Args:
        weight: dense weights W, fp32 (out, in).
        gram: Xᵀ X, fp32 (in, in).
        mask: bool (out, in), True = kept.
        start: first guess; default W on the mask.
        steps: iterations; each costs one (out, in) × (in, in) product.
        damping: on the unit-diagonal gram, towards `weight`.
        cross: Yᵀ X (out, in) of the wanted outputs Y; default those of W, which is W Xᵀ X.

    Returns:
        W' (out, in), zero where the mask is. No row has a higher layer error than in `start`.
    """
    scaled, scale = unit_diagonal(gram, damping)
    start = (weight if start is None else start) * mask
    goal = normal_equations(weight, scaled, scale, damping, cross)
    new = conjugate_gradients(scaled, goal, mask, start * scale, steps) / scale * mask
    return safer_rows(weight, new, start, gram, cross)


def normal_equations(weight: Tensor, scaled: Tensor, scale: Tensor, damping: float, cross: Tensor | None) -> Tensor:
    """Right side B (out, in) of W' A = B in unit-diagonal space, A = `scaled` with its damping towards `weight`."""
    dense = weight * scale
    if cross is None:
        return dense @ scaled
    alive = scaled.diagonal() > 0.5  # nothing can be asked of an input that is never active
    return torch.nan_to_num(cross / scale) * alive + damping * dense


def conjugate_gradients(matrix: Tensor, goal: Tensor, mask: Tensor, guess: Tensor, steps: int) -> Tensor:
    """Solves (W A)[mask] = B[mask] for W supported on `mask`, each row by itself.

    Args:
        matrix: A, symmetric positive definite (in, in).
        goal: B (out, in).
        guess: start (out, in), zero outside the mask.
    """
    guess = guess.clone()
    mask = mask.to(guess.dtype)  # a product with a bool mask takes four times as long
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


def safer_rows(weight: Tensor, new: Tensor, plain: Tensor, gram: Tensor, cross: Tensor | None = None) -> Tensor:
    """Of each row the better of a solution and of something plain, by the layer error itself, without damping.

    A solver ends where its own, damped and rounded problem says; a gram that is far from positive definite, or of
    fewer tokens than inputs, can put that far from any sensible weight, NaN and infinity included.

    Args:
        weight: dense weights W, fp32 (out, in).
        new: the solution (out, in).
        plain: what it must not be worse than (out, in), such as W on the same mask.
        gram, cross: as `least_squares` takes them.
    """
    # The difference of both errors in one product: (N − P) · ((N + P) G − 2 C), C = W G if nothing else is asked.
    both = new + plain
    slope = (both - 2 * weight) @ gram if cross is None else both @ gram - 2 * torch.nan_to_num(cross)
    parts = (new - plain) * slope
    change, size = parts.sum(1), parts.abs().sum(1)
    worse = ~(change <= 0)  # NaN counts as worse
    if not worse.any():
        return new
    if (worse & ~(change <= 1e-3 * size).logical_and(size.isfinite())).any():  # by more than rounding
        warn_once(
            logger,
            "the solution of some rows was worse than dropping the same connections, so these were just dropped: "
            "more calibration tokens, or less correlated inputs, would help",
        )
    return torch.where(worse.unsqueeze(1), plain, new)


def mean(weight: Tensor, mask: Tensor, gram: Tensor | None = None) -> Tensor:
    """The paper's rule done right: each row's pruned sum is spread evenly over its kept connections.

    The published code zeroes the pruned values before it sums them, so that it moves nothing; here the sum is
    taken first. `weight` (out, in), `mask` bool (out, in). With a `gram` (in, in) of the inputs, rows that lose more so
    than by dropping keep their values as they are.
    """
    moved = (weight * ~mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
    new = (weight + moved) * mask
    if gram is None:
        return new
    plain = weight * mask
    worse = layer_error(weight, new, gram) > layer_error(weight, plain, gram)
    return torch.where(worse.unsqueeze(1), plain, new)


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
