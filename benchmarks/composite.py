"""A composite of public ideas, as a control: ALPS, stage by stage, towards the outputs that the dense model's own
inputs give (error propagation as in QEP, arXiv 2504.09629), with MAMA's budget. Not of the product.

What differs from MAMA: the solver is ALPS's, and a layer that writes to the residual stream is asked for its own dense
outputs, not for the difference to the dense stream, so that it does not repair what others have lost.
"""

import torch
from torch import Tensor

from mama_trl.solvers.alps import alps
from mama_trl.solvers.methods import Method
from mama_trl.solvers.problem import LayerProblem, Solution
from mama_trl.solvers.redistribution import unit_diagonal


def solve_composite(problem: LayerProblem) -> Solution:
    """ALPS on the weight that best gives the goal on the inputs at hand: W* = Y Xᵀ (X Xᵀ)⁻¹, damped towards W.

    ALPS's layer problem knows no goals but its weight's own outputs; those of W* are the goal's projection on what
    these inputs can give, so that the two problems differ by a constant.
    """
    weight, inputs = problem.weight, problem.inputs
    target = weight
    if problem.goal is not None:
        target = towards(weight, inputs.gram, problem.goal.cross - _of_bias(problem))
    return Solution(*alps(target, inputs.gram, problem.sparsity, problem.nm))


COMPOSITE = Method(
    solve_composite, "gram and own goal", "composite", "ALPS stage by stage with error propagation", budget="predicted"
)


def towards(weight: Tensor, gram: Tensor, cross: Tensor, damping: float = 1e-2) -> Tensor:
    """W* = (Y Xᵀ + δ W) (X Xᵀ + δ I)⁻¹ in the space of unit diagonal."""
    scaled, scale = unit_diagonal(gram, damping)
    factor = torch.linalg.cholesky(scaled)
    right = cross / scale + damping * weight * scale
    return torch.cholesky_solve(right.t(), factor).t() / scale


def _of_bias(problem: LayerProblem) -> Tensor | float:
    """What the bias, which stays, gives of the goal: b Σ xᵀ."""
    return 0.0 if problem.bias is None else problem.bias.outer(problem.inputs.total)
