"""Moving pruned values to the kept ones, and exchanges of connections."""

import torch

from mama_trl.solvers.redistribution import bias_shift, least_squares, mean

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




