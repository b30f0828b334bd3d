"""MAMA's layer problem: mask and redistributed values found together.

min over W' of ‖X (W − W')ᵀ‖² with a given number of non-zeros, by ADMM on the unit-diagonal gram with the mask
chosen along a cubic ramp (after Boža, arXiv 2401.02938, and ALPS, arXiv 2406.07831), then the kept weights are
refitted on the final support by projected conjugate gradients.
"""

from typing import Optional

import torch
from torch import Tensor

from ..redistribution import least_squares, unit_diagonal
from ..selection import matrix_mask

ITERATIONS = 40
RAMP = 30  # iterations over which the sparsity rises to its target
DAMPING = 1e-2


def mama(
    weight: Tensor,
    gram: Tensor,
    sparsity: float,
    group: Optional[tuple[int, int]] = None,
    importance: Optional[Tensor] = None,
    penalty: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mask and least-squares redistribution together.

    Args:
        weight: W, fp32 (out, in).
        gram: Xᵀ X, fp32 (in, in).
        sparsity: pruned share of the matrix, exact.
        group: (N, M) pattern or None.
        importance: (out, in) > 0, multiplies the projection's score |w| ‖x‖; None = activation alone.
        penalty: ADMM's ρ on the unit-diagonal gram.

    Returns:
        (new weight (out, in), bool mask (out, in)).
    """
    scaled, scale = unit_diagonal(gram, DAMPING)
    dense = weight * scale
    inputs = scaled.shape[0]
    eye = torch.eye(inputs, device=scaled.device, dtype=scaled.dtype)
    # Damped well, so the factor exists; computed once and reused in every iteration.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled + penalty * eye))
    goal = dense @ scaled
    dual = torch.zeros_like(dense)
    current = dense
    for iteration in range(1, ITERATIONS + 1):
        ramp = 1.0 - (1.0 - min(iteration / RAMP, 1.0)) ** 3
        wish = current + dual
        score = wish.abs() if importance is None else wish.abs() * importance
        mask = matrix_mask(score, sparsity * ramp, group)
        sparse = wish * mask
        dual = wish - sparse
        current = (goal + penalty * (sparse - dual)) @ inverse
    return least_squares(weight, gram, mask, start=sparse / scale, damping=DAMPING / 10), mask
