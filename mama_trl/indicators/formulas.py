"""Indicators: one number per connection, higher = more important. Pure functions of tensors of any shape.

`weight` is (out, in) unless said otherwise; results are fp32 and non-negative. The rules of what is recorded while
training are trajectory.py's.
"""

from typing import Callable, Protocol

from torch import Tensor


class Inputs(Protocol):
    """Statistics of a layer's inputs (a `Gram`): `gram` (in, in), `norm` (in,) and `mean` (in,)."""

    gram: Tensor

    @property
    def norm(self) -> Tensor: ...

    @property
    def mean(self) -> Tensor: ...


def magnitude(weight: Tensor) -> Tensor:
    """|w|."""
    return weight.float().abs()


def activation(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|w_ij| ‖x_j‖ (Wanda, arXiv 2306.11695, eq. 1); `input_norm` (in,) is over calibration tokens."""
    return weight.float().abs() * input_norm.float()


def sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w g|, one step's contribution (Molchanov et al., arXiv 1906.10771); its running mean is the statistic."""
    return (weight.float() * gradient.float()).abs()


def curvature(weight: Tensor, second_moment: Tensor) -> Tensor:
    """w² √v with Adam's second moment v: an estimate of w² h/2 that costs no memory."""
    return weight.float().square() * second_moment.float().sqrt()


# Indicators that follow from the weight and the inputs at hand; all others come from a source (source.py).
COMPUTED: dict[str, Callable[[Tensor, Inputs], Tensor]] = {
    "magnitude": lambda weight, inputs: magnitude(weight),
    "activation": lambda weight, inputs: activation(weight, inputs.norm),
}
