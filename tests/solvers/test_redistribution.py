"""Moving pruned values to the kept ones, and exchanges of connections."""

import pytest
import torch

from mama_trl.solvers.exchange import exchange, objective
from mama_trl.solvers.magnitude import magnitude
from mama_trl.solvers.redistribution import bias_shift, least_squares, mean, unit_diagonal

from ..helpers import layer


def test_least_squares_equals_the_closed_form_on_each_support():
    weight, samples = layer()
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.5
    ours = least_squares(weight, samples.T @ samples, mask, steps=200, damping=0.0)
    for row in range(weight.shape[0]):
        support = mask[row].nonzero().squeeze(1)
        exact = torch.linalg.lstsq(samples[:, support].double(), (samples @ weight[row]).double().unsqueeze(1)).solution
        assert torch.allclose(ours[row, support].double(), exact.squeeze(1), atol=2e-3, rtol=2e-3)
    assert torch.all(ours[~mask] == 0)


def test_mean_moves_the_pruned_sum_of_each_row():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[True, False, True, False]])
    assert mean(weight, mask).tolist() == [[4.0, 0.0, 6.0, 0.0]]


def test_bias_shift_keeps_the_mean_output():
    weight, samples = layer()
    samples = samples + 3.0
    kept = weight * (weight.abs() > 0.7)
    before = (samples @ weight.T).mean(0)
    after = (samples @ kept.T).mean(0) + bias_shift(weight, kept, samples.mean(0))
    assert torch.allclose(before, after, atol=1e-3)


def test_exchange_finds_the_better_support_by_hand():
    """One output, three inputs, the first two nearly alike: keeping both is a waste."""
    matrix = torch.tensor([[1.0, 0.95, 0.0], [0.95, 1.0, 0.0], [0.0, 0.0, 1.0]])
    goal = torch.tensor([[1.0, 1.0, 1.0]]) @ matrix
    mask = torch.tensor([[True, True, False]])
    values, better = exchange(matrix, goal, torch.tensor([[1.0, 1.0, 0.0]]), mask)
    # 1, 1 against a residual of 1: no strict gain in the scores, so nothing is exchanged ...
    assert objective(matrix, goal, values).sum() <= objective(matrix, goal, torch.tensor([[1.0, 1.0, 0.0]])).sum()
    goal = torch.tensor([[0.6, 0.6, 1.0]]) @ matrix
    values, better = exchange(matrix, goal, torch.tensor([[0.6, 0.6, 0.0]]), mask)
    assert int(better.sum()) == 2 and bool(better[0, 2])  # ... but a larger residual comes in
    kept = int(better[0, :2].nonzero())
    assert values[0, kept].item() == pytest.approx(0.6 * 1.95, abs=1e-3)
    assert values[0, 2].item() == pytest.approx(1.0, abs=1e-3)


def test_exchange_never_raises_the_error_and_keeps_the_pattern():
    weight, samples = layer(outputs=20, inputs=32)
    gram, scale = unit_diagonal(samples.T @ samples, 1e-3)
    goal = weight * scale @ gram
    for group in (None, (2, 4)):
        mask = magnitude(weight, 0.5, group)[1]
        values = least_squares(weight, samples.T @ samples, mask) * scale
        new, better = exchange(gram, goal, values, mask, group)
        assert int(better.sum()) == int(mask.sum()) and torch.all(new[~better] == 0)
        assert objective(gram, goal, new).sum() < objective(gram, goal, values).sum()
        if group:
            assert torch.all(better.view(20, 8, 4).sum(-1) == 2)
