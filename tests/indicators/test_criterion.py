"""Several indicators as one score, by hand."""

import torch

from mama_trl.indicators.combine import Criterion, weights_and_biases
from mama_trl.solvers.problem import Gram


def test_a_criterion_is_a_geometric_mean():
    """As a score, and as what multiplies |w| ‖x‖ in a solver, with the exponent of ‖x‖ that the shares give it."""
    weight, norm = torch.tensor([[1.0, -4.0], [2.0, 1.0]]), torch.tensor([9.0, 4.0])
    inputs = Gram(torch.diag(norm**2), torch.zeros(2), 1)
    score = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    activation = weight.abs() * norm
    for weights, exponent, expected in (
        ({"activation": 1.0, "sensitivity": 1.0}, 0.5, (activation * score).sqrt()),
        ({"activation": 1.0, "magnitude": 3.0}, 0.25, weight.abs() * norm**0.25),
        ({"magnitude": 1.0}, 0.0, weight.abs()),
        ({"sensitivity": 2.0}, 0.0, score),
    ):
        criterion = Criterion(weights)
        found = {"sensitivity": score} if "sensitivity" in weights else {}
        assert criterion.input_exponent == exponent
        direct = criterion.score(weight, inputs, found)
        in_solver = activation * criterion.multiplier(weight, inputs, found)
        assert torch.allclose(direct / direct[0, 0], expected / expected[0, 0], rtol=1e-5)
        assert torch.allclose(in_solver / in_solver[0, 0], expected / expected[0, 0], rtol=1e-5)
    assert Criterion({"activation": 2.0}).multiplier(weight, inputs, {}) is None


def test_weights_and_biases_by_hand():
    weight = torch.tensor([[1.0, -4.0], [2.0, 1.0]])
    assert weights_and_biases(weight, torch.tensor([1.0, -3.0])).tolist() == [[1.5, 6.0], [5.0, 2.5]]
    assert weights_and_biases(weight, None).tolist() == [[1.0, 4.0], [2.0, 1.0]]
