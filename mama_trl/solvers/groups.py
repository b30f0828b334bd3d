"""Which structures (groups of a layer's inputs) cost least to remove, and the refitted rest. Pure functions.

In the layer problem min ‖X (W − W')ᵀ‖² with the columns P of W' zero, removing P costs tr(W_P [(G⁻¹)_PP]⁻¹ W_Pᵀ) with
G = Xᵀ X (optimal brain surgeon for groups; as in ZipLM, arXiv 2302.04089, and structured SparseGPT). The cheapest go,
G⁻¹ and W are brought up to date, and so on; the kept columns are then refitted by least squares.
"""

from typing import Optional

import torch
from torch import Tensor

from ..selection.largest import keep_mask
from .problem import Gram
from .redistribution import bias_shift, unit_diagonal

DAMPING = 1e-2  # on the unit-diagonal gram
STEP = 0.02  # share of the living structures that goes at once


def structure_costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """What removing each structure costs when all others are refitted.

    Args:
        weight: (out, in), a structure is `size` consecutive columns.
        inverse: inverse of the damped gram, (in, in).

    Returns:
        (in / size,): tr(W_P [(G⁻¹)_PP]⁻¹ W_Pᵀ).
    """
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = weight.shape[1] // size
    columns = weight.t().reshape(count, size, -1)
    index = torch.arange(weight.shape[1], device=weight.device).view(count, size)
    blocks = inverse[index.unsqueeze(2), index.unsqueeze(1)]
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))


def choose_structures(weight: Tensor, gram: Tensor, size: int, keep: int, damping: float = DAMPING) -> Tensor:
    """Greedy backward elimination: bool (in / size,), True at `keep` kept structures.

    Args:
        weight: reader's weight, fp32 (out, in).
        gram: Xᵀ X of its inputs, fp32 (in, in).
        size: consecutive columns of a structure.
        damping: on the unit-diagonal gram.
    """
    scaled, scale = unit_diagonal(gram, damping)
    # Double precision: thousands of updates of one inverse add up their rounding.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled.double()))
    weight = weight.double() * scale.double()
    count = weight.shape[1] // size
    kept = torch.ones(count, dtype=torch.bool, device=weight.device)
    alive = count
    while alive > keep:
        go = min(max(1, int(alive * STEP)), alive - keep)
        costs = structure_costs(weight, inverse, size).float().masked_fill(~kept, float("inf"))
        gone = keep_mask(-costs, go)  # the cheapest; those gone already cost infinitely much
        kept &= ~gone
        alive -= go
        columns = gone.repeat_interleave(size)
        solved = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        weight -= weight[:, columns] @ solved
        inverse.addmm_(inverse[:, columns], solved, alpha=-1)
        # Gone for good: a unit block keeps later solves regular.
        weight[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse.diagonal()[columns] = 1
    return kept


def refit(weight: Tensor, gram: Tensor, columns: Tensor, damping: float = DAMPING) -> Tensor:
    """Least-squares weights on the kept `columns` (bool (in,)): W_S + W_P G_PS (G_SS)⁻¹, zero elsewhere, fp32.

    Damped on the unit diagonal, towards W.
    """
    scaled, scale = unit_diagonal(gram, damping)
    scaled, scale = scaled.double(), scale.double()
    scaled_weight = weight.double() * scale
    new = torch.zeros_like(scaled_weight)
    moved = scaled_weight[:, ~columns] @ scaled[~columns][:, columns]
    factor = torch.linalg.cholesky(scaled[columns][:, columns])
    new[:, columns] = scaled_weight[:, columns] + torch.cholesky_solve(moved.t(), factor).t()
    return (new / scale).float()


def solve_structures(
    weight: Tensor,
    gram: Gram,
    size: int,
    keep: int,
    method: str = "mama",
    redistribution: str = "least_squares",
    has_bias: bool = False,
    importance: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """One reader: which structures stay, its new weight, and what its bias gains.

    Args:
        weight: fp32 (out, in).
        gram: of its inputs.
        method: `mama` (cost after refitting), `wanda` (norm of the structure's columns × input norms), or
            `importance` given from outside (magnitude, random).
        redistribution: `least_squares` or `none`.
        has_bias: then the mean of what is missing goes into the bias and only deviations from it are fitted.
        importance: (in / size,), higher = kept.

    Returns:
        (bool (in / size,), fp32 (out, in) with zero columns, (out,) or None).
    """
    fitted = gram.centred if has_bias and redistribution == "least_squares" else gram.gram
    if importance is not None:
        kept = keep_mask(importance, keep)
    elif method == "wanda":
        kept = keep_mask((weight * gram.norm).square().sum(0).view(-1, size).sum(1), keep)
    else:
        kept = choose_structures(weight, fitted, size, keep)
    columns = kept.repeat_interleave(size)
    if redistribution == "none":
        return kept, weight * columns, None
    new = refit(weight, fitted, columns)
    return kept, new, bias_shift(weight, new, gram.mean) if has_bias else None
