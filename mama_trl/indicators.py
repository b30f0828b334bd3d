"""Indicators: one number per connection, higher = more important. Pure functions of tensors of any shape.

`weight` is (out, in) unless said otherwise; results are fp32 and non-negative but for `movement`.
"""

from typing import Optional

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|w|."""
    return weight.float().abs()


def activation(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|w_ij| ‖x_j‖ (Wanda, arXiv 2306.11695, eq. 1); `input_norm` (in,) is over calibration tokens."""
    return weight.float().abs() * input_norm.float()


def sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w g|, one step's contribution (Molchanov et al., arXiv 1906.10771); its running mean is the statistic."""
    return (weight.float() * gradient.float()).abs()


def movement(weight: Tensor, gradient: Tensor) -> Tensor:
    """−w g: positive when training pushes the weight away from zero (arXiv 2005.07683, eq. 4)."""
    return -(weight.float() * gradient.float())


def curvature(weight: Tensor, second_moment: Tensor) -> Tensor:
    """w² √v with Adam's second moment v: an estimate of w² h/2 that costs no memory."""
    return weight.float().square() * second_moment.float().sqrt()


def combine(scores: dict[str, Tensor], weights: dict[str, float], means: Optional[dict[str, float]] = None) -> Tensor:
    """Weighted geometric mean: Π s_i^(w_i / Σ w). Free of each indicator's scale, so no normalisation.

    A negative score (movement away from importance) counts as zero. `means` are those of the whole matrices where
    `scores` are a part of them; they only keep powers of numbers near 1e-12 from underflowing. Raises KeyError for
    a missing score.
    """
    total = sum(weights.values())
    result: Optional[Tensor] = None
    for name, weight in weights.items():
        factor = scores[name].float().clamp_min(0)
        mean = factor.mean() if means is None else torch.as_tensor(means[name], device=factor.device)
        factor = (factor / mean.clamp_min(1e-38)).pow(weight / total)
        result = factor if result is None else result * factor
    return result if result is not None else torch.empty(0)
