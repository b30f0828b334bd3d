"""Indicators: one number per connection, higher = more important. Pure functions of tensors of any shape.

`weight` is (out, in) unless said otherwise; results are fp32 and non-negative but for `movement`.
"""

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
