"""Indicators and their combination, by hand."""

import torch

from mama_trl.config import STATISTICS
from mama_trl.indicators.combine import combine
from mama_trl.indicators.formulas import activation, curvature, sensitivity
from mama_trl.indicators.trajectory import RULES


def test_indicators_by_hand():
    weight, gradient = torch.tensor([[2.0, -3.0]]), torch.tensor([[0.5, 0.5]])
    assert activation(weight, torch.tensor([10.0, 1.0])).tolist() == [[20.0, 3.0]]
    assert sensitivity(weight, gradient).tolist() == [[1.0, 1.5]]
    assert [RULES[name].of_step(weight * gradient).tolist() for name in ("sensitivity", "movement", "reward")] == [
        [[1.0, 1.5]], [[-1.0, 1.5]], [[1.0, 2.25]]
    ]
    assert set(RULES) == set(STATISTICS)
    assert curvature(weight, torch.tensor([[4.0, 1.0]])).tolist() == [[8.0, 9.0]]


def test_combination_is_a_geometric_mean_free_of_scale():
    a, b = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([9.0, 1.0, 4.0])
    both = combine({"a": a, "b": b}, {"a": 1.0, "b": 1.0})
    scaled = combine({"a": a * 1e-9, "b": b * 1e6}, {"a": 1.0, "b": 1.0})
    assert torch.allclose(both / both[0], (a * b).sqrt() / 3)
    assert torch.allclose(both, scaled)
