"""The layer problem: what a method is given of one matrix, and what it gives back. Tensors and numbers only."""

from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import Tensor

from ..indicators.combine import Criterion
from .redistribution import centred


@dataclass
class Gram:
    """Statistics of one layer's inputs X (tokens, in), fp32: `gram` Xᵀ X (in, in) and `total` Σ x (in,).

    The gram is SparseGPT's Hessian of the layer's squared error up to a factor: their H is 2 Xᵀ X over the tokens.
    """

    gram: Tensor
    total: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, inputs: int, device: torch.device | str) -> "Gram":
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
        """Gram of the deviations from the mean input, (in, in); exactly zero for inputs that do not vary."""
        return centred(self.gram, self.total, self.tokens)[0]

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
    def of_inputs(
        cls, weight: Tensor, bias: Optional[Tensor], pairs: Tensor, dense_total: Tensor, gram: Gram
    ) -> "Goal":
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
class LayerProblem:
    """One matrix to prune: min over W' of ‖X W'ᵀ − Y‖² with a given number of non-zeros, or what a method makes of it.

    Args:
        weight: (out, in) fp32.
        bias: (out,) fp32, or None.
        sparsity: pruned share of the matrix.
        nm: (N, M) pattern, which takes precedence over the sparsity; None = unstructured.
        by_row: the same number kept in each output row, instead of where the matrix needs them.
        inputs: statistics of the inputs that the pruned layers before this one compute; of no inputs at all where the
            method needs nothing.
        goal: what the layer should put out (bias included); None = what its dense weight makes of these inputs.
        redistribution: none, mean, bias or least_squares.
        criterion: by which connections are judged.
        scores: (out, in) by name of each indicator that the criterion takes from a source.
    """

    weight: Tensor
    bias: Optional[Tensor] = None
    sparsity: float = 0.5
    nm: Optional[tuple[int, int]] = None
    by_row: bool = False
    inputs: Gram = field(default_factory=lambda: Gram.zeros(0, "cpu"))
    goal: Optional[Goal] = None
    redistribution: str = "least_squares"
    criterion: Criterion = Criterion({"activation": 1.0})
    scores: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Solution:
    """One solved matrix: `weight` fp32 (out, in), bool `mask` (out, in), the new bias (out,) or None if it stays."""

    weight: Tensor
    mask: Tensor
    bias: Optional[Tensor] = None
