"""Which structures go, and the refitted rest, on matrices."""

import itertools

import pytest
import torch

from mama_trl.solvers.groups import choose_structures, refit, solve_structures, structure_costs
from mama_trl.solvers.problem import Gram


def layer(outputs=6, inputs=8, tokens=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(tokens, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    return torch.randn(outputs, inputs, generator=generator), samples


def error_without(weight, samples, columns) -> float:
    """‖X (W − W')ᵀ‖² with the best W' that has these columns zero, by a plain least-squares solver."""
    kept = [j for j in range(weight.shape[1]) if j not in columns]
    goal = (samples @ weight.T).double()
    solution = torch.linalg.lstsq(samples[:, kept].double(), goal).solution
    return float((goal - samples[:, kept].double() @ solution).square().sum())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_cost_is_the_error_that_the_best_refit_leaves(size):
    weight, samples = layer()
    inverse = torch.linalg.inv((samples.T @ samples).double())
    costs = structure_costs(weight.double(), inverse, size)
    for index, cost in enumerate(costs):
        gone = list(range(index * size, (index + 1) * size))
        assert float(cost) == pytest.approx(error_without(weight, samples, gone), rel=1e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_choice_is_near_the_best_of_all_subsets(size):
    weight, samples = layer()
    count = 8 // size
    kept = choose_structures(weight, samples.T @ samples, size, count // 2, damping=1e-6)
    assert int(kept.sum()) == count // 2
    gone = (~kept).repeat_interleave(size).nonzero().flatten().tolist()
    errors = sorted(
        error_without(weight, samples, [c for s in subset for c in range(s * size, (s + 1) * size)])
        for subset in itertools.combinations(range(count), count - count // 2)
    )
    assert error_without(weight, samples, gone) <= errors[len(errors) // 5]


def test_an_input_that_others_replace_goes_first():
    """Input 2 is the sum of 0 and 1, has the largest weight and norm, and yet is the one that is not missed."""
    _, samples = layer(inputs=3)
    samples[:, 2] = samples[:, 0] + samples[:, 1]
    weight = torch.tensor([[1.0, 1.0, 5.0]])
    gram = Gram.zeros(3, "cpu")
    gram.add(samples)
    kept, new, shift = solve_structures(weight, gram, 1, 2)
    assert int(kept.sum()) == 2 and shift is None
    assert float((samples @ (weight - new).T).square().sum()) < 1e-3 * float((samples @ weight.T).square().sum())
    by_size, _, _ = solve_structures(weight, gram, 1, 1, method="wanda")
    assert by_size.tolist() == [False, False, True]


def test_refit_is_least_squares_on_the_kept_columns():
    weight, samples = layer()
    columns = torch.tensor([True, False, True, True, False, True, True, False])
    new = refit(weight, samples.T @ samples, columns, damping=1e-7)
    exact = torch.linalg.lstsq(samples[:, columns].double(), (samples @ weight.T).double()).solution.T
    assert torch.allclose(new[:, columns].double(), exact, atol=1e-2, rtol=1e-2)
    assert torch.all(new[:, ~columns] == 0)


def test_the_bias_takes_up_the_mean():
    weight, samples = layer()
    samples = samples + 4.0
    gram = Gram.zeros(8, "cpu")
    gram.add(samples)
    _, new, shift = solve_structures(weight, gram, 1, 4, has_bias=True)
    assert torch.allclose((samples @ weight.T).mean(0), (samples @ new.T).mean(0) + shift, atol=1e-2)


@pytest.mark.parametrize("case", ["dead inputs", "one token", "no input at all"])
def test_degenerate_inputs_give_finite_weights(case):
    weight, samples = layer()
    if case == "dead inputs":
        samples[:, 2:5] = 0
    gram = Gram.zeros(8, "cpu")
    gram.add(samples[:1] if case == "one token" else samples * (case == "dead inputs"))
    kept, new, _ = solve_structures(weight, gram, 2, 2)
    assert int(kept.sum()) == 2 and torch.isfinite(new).all()
