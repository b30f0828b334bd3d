"""The methods, by name: what each needs of a layer's inputs, and how it solves one layer problem.

The command line's help, tables, plots and docs/baselines.md read this table. A method is added by one line here; one
that is not worth a line is given to `prune` as a `Method`.
"""

from dataclasses import dataclass
from typing import Callable

from ..errors import MamaError
from ..selection.patterns import matrix_mask
from . import alps, magnitude, sparsegpt, wanda
from .mama import mama
from .problem import LayerProblem, Solution
from .redistribution import MOVES, centred, centred_cross

NEEDS = ("nothing", "norm", "gram", "gram and own goal", "gram and goal")


@dataclass(frozen=True)
class Method:
    """How one matrix is pruned.

    Args:
        solve: the layer problem's solution; a pure function of tensors.
        needs: what it reads of the layer: `nothing` but the weight; the inputs' `norm`; their whole `gram`; or `gram
            and own goal`, for which the layers of a block are measured one after the other, each on inputs that the
            pruned ones before it compute, with a second stream of hidden states for what each puts out in the dense
            model; `gram and goal`, where a layer that writes to the residual stream is asked for what that lacks.
        label: how tables and plots call it.
        summary: what it does, for the command line's help.
        budget: the allocation it uses where none is named; published methods share the sparsity uniformly.
        tunable: whether it takes `scope`, `indicators` and `redistribution`; published methods come as they are.
        inversions, products: how often a solve inverts a matrix (in, in) and multiplies one (out, in) with it; only
            for telling how long it will take.
    """

    solve: Callable[[LayerProblem], Solution]
    needs: str
    label: str
    summary: str
    budget: str = "uniform"
    tunable: bool = False
    inversions: float = 0
    products: float = 0

    def __post_init__(self) -> None:
        if self.needs not in NEEDS:
            raise MamaError(f"`needs` of method {self.label} is {self.needs!r}: use one of {', '.join(NEEDS)}.")


def solve_magnitude(problem: LayerProblem) -> Solution:
    return Solution(*magnitude.magnitude(problem.weight, problem.sparsity, problem.nm))


def solve_wanda(problem: LayerProblem) -> Solution:
    return Solution(*wanda.wanda(problem.weight, problem.inputs.norm, problem.sparsity, problem.nm))


def solve_sparsegpt(problem: LayerProblem) -> Solution:
    return Solution(*sparsegpt.sparsegpt(problem.weight, problem.inputs.gram, problem.sparsity, problem.nm))


def solve_alps(problem: LayerProblem) -> Solution:
    return Solution(*alps.alps(problem.weight, problem.inputs.gram, problem.sparsity, problem.nm))


def solve_mama(problem: LayerProblem, goals: bool = True) -> Solution:
    """MAMA's way: mask and redistributed values together with least_squares, else the mask by the criterion's score.

    Args:
        goals: whether the layer aims at the dense model's outputs; False = at what its dense weight makes of the
            inputs it gets, as other methods do.
    """
    weight, bias, inputs = problem.weight, problem.bias, problem.inputs
    goal = problem.goal if goals else None
    if problem.redistribution != "least_squares":
        score = problem.criterion.score(weight, inputs, problem.scores)
        mask = matrix_mask(score, problem.sparsity, problem.nm, problem.by_row)
        new, shift = MOVES[problem.redistribution](weight, mask, inputs)
        return Solution(new, mask, None if bias is None or shift is None else bias + shift)
    importance = problem.criterion.multiplier(weight, inputs, problem.scores)
    cross = None if goal is None else goal.cross
    if bias is None:
        return Solution(
            *mama(weight, inputs.gram, problem.sparsity, problem.nm, importance, cross=cross, by_row=problem.by_row)
        )
    # A bias takes up the mean for free, so only the deviations from it are left to fit.
    wanted = weight @ inputs.mean + bias if goal is None else goal.total / max(inputs.tokens, 1)
    gram, constant = centred(inputs.gram, inputs.total, inputs.tokens)
    if cross is not None:
        cross = centred_cross(cross, inputs.total, wanted, constant)
    new, mask = mama(weight, gram, problem.sparsity, problem.nm, importance, cross=cross, by_row=problem.by_row)
    return Solution(new, mask, wanted - new @ inputs.mean)


METHODS: dict[str, Method] = {
    "magnitude": Method(solve_magnitude, "nothing", "magnitude", "the smallest |w| of each matrix go"),
    "wanda": Method(solve_wanda, "norm", "Wanda", "|w| times the input's norm, within each output row"),
    "sparsegpt": Method(
        solve_sparsegpt, "gram", "SparseGPT", "column by column, each error compensated in the columns to its right",
        inversions=2, products=2,
    ),
    "alps": Method(
        solve_alps, "gram", "ALPS", "ADMM on the layer problem with a growing penalty", inversions=10, products=200
    ),
    "mama": Method(
        solve_mama, "gram and goal", "MAMA", "mask and redistribution together, towards the dense model's outputs",
        budget="predicted", tunable=True, inversions=6, products=25,
    ),
}


def overview() -> str:
    """One line a method, for the command line's help."""
    return "\n".join(f"  {name:<10} {m.summary} (needs {m.needs})" for name, m in METHODS.items())
