"""One layer's pruning problem."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from ..selection.patterns import matrix_mask
from .mama import mama
from .redistribution import bias_shift, mean


@dataclass
class Gram:
    """Statistics of one layer's inputs X (tokens, in), fp32: `gram` Xᵀ X (in, in) and `total` Σ x (in,)."""

    gram: Tensor
    total: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, inputs: int, device) -> "Gram":
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, device=device))

    def add(self, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.gram.addmm_(rows.t(), rows)
        self.total += rows.sum(0)
        self.tokens += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.tokens, 1)

    @property
    def centred(self) -> Tensor:
        """Gram of the deviations from the mean input, (in, in)."""
        return self.gram - self.total.outer(self.mean)

    @property
    def norm(self) -> Tensor:
        """‖x_j‖ of each input over the calibration tokens, (in,)."""
        return self.gram.diagonal().clamp_min(0).sqrt()


@dataclass
class Goal:
    """What a layer should put out, over the tokens of its `Gram`: Σ y* xᵀ (out, in) and Σ y* (out,), fp32."""

    cross: Tensor
    total: Tensor

    @classmethod
    def of_inputs(cls, weight: Tensor, bias: Optional[Tensor], pairs: Tensor, dense_total: Tensor, gram: Gram):
        """The outputs W x' + b of the dense model's inputs x', from `pairs` Σ x' xᵀ (in, in) and Σ x' (in,)."""
        cross, total = weight @ pairs, weight @ dense_total
        if bias is not None:
            cross, total = cross + bias.outer(gram.total), total + gram.tokens * bias
        return cls(cross, total)

    def add(self, outputs: Tensor, inputs: Tensor) -> None:
        """`outputs` y* (tokens, out) and `inputs` x (tokens, in) of one batch, fp32."""
        self.cross.addmm_(outputs.t(), inputs)
        self.total += outputs.sum(0)


@dataclass
class Solution:
    """One solved matrix: `weight` fp32 (out, in), bool `mask` (out, in), the new bias (out,) or None if it stays."""

    weight: Tensor
    mask: Tensor
    bias: Optional[Tensor] = None


def solve_mama(
    weight: Tensor,
    bias: Optional[Tensor],
    gram: Gram,
    goal: Optional[Goal],
    sparsity: float,
    group: Optional[tuple[int, int]],
    redistribution: str,
    importance: Optional[Tensor] = None,
    exchanges: bool = True,
    by_row: bool = False,
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """One matrix by MAMA; a pure function of tensors.

    Args:
        weight: (out, in) fp32.
        bias: (out,) fp32 or None.
        gram: statistics of the inputs that the pruned layers before it compute.
        goal: what the layer should put out (bias included); None = what its dense weight makes of these inputs.

    Returns:
        (new weight, bool mask (out, in), new bias or None where there is none or it stays).
    """
    if redistribution != "least_squares":
        score = weight.abs() * gram.norm
        mask = matrix_mask(score if importance is None else score * importance, sparsity, group, by_row)
        new = mean(weight, mask) if redistribution == "mean" else weight * mask
        if redistribution == "bias" and bias is not None:
            return new, mask, bias + bias_shift(weight, new, gram.mean)
        return new, mask, None
    how = {"exchanges": exchanges, "by_row": by_row}
    cross = None if goal is None else goal.cross
    if bias is None:
        new, mask = mama(weight, gram.gram, sparsity, group, importance, cross=cross, **how)
        return new, mask, None
    # A bias takes up the mean for free, so only the deviations from it are left to fit.
    wanted = weight @ gram.mean + bias if goal is None else goal.total / max(gram.tokens, 1)
    if cross is not None:
        cross = cross - wanted.outer(gram.total)
    new, mask = mama(weight, gram.centred, sparsity, group, importance, cross=cross, **how)
    return new, mask, wanted - new @ gram.mean
