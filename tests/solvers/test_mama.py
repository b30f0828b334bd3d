"""MAMA's solver, and what every solver must withstand."""

import pytest
import torch

from mama_trl.selection.patterns import row_mask
from mama_trl.solvers.alps import alps
from mama_trl.solvers.mama import mama
from mama_trl.solvers.problem import Gram
from mama_trl.solvers.redistribution import layer_error
from mama_trl.solvers.sparsegpt import sparsegpt
from mama_trl.solvers.wanda import wanda

from ..helpers import layer


def test_every_row_keeps_the_same_number_where_rows_compete():
    weight, samples = layer(outputs=12, inputs=32, tokens=400)
    gram = samples.T @ samples
    new, mask = mama(weight, gram, 0.75, by_row=True)
    assert mask.sum(1).tolist() == [8] * 12 and torch.all(new[~mask] == 0)
    row_wise = weight * row_mask(weight.abs() * gram.diagonal().sqrt(), 0.75)
    assert layer_error(weight, new, gram).sum() < layer_error(weight, row_wise, gram).sum()


def test_goals_let_a_layer_repair_what_its_inputs_lack():
    """With noisy inputs and the clean outputs as goal, the error is below that of repeating the dense weight."""
    weight, clean = layer(outputs=10, inputs=16, tokens=800)
    noisy = clean * 0.8 + 0.3 * clean.roll(1, dims=1)
    wanted = clean @ weight.T
    gram = noisy.T @ noisy
    plain, _ = mama(weight, gram, 0.3)
    ours, _ = mama(weight, gram, 0.3, cross=wanted.T @ noisy)
    assert (noisy @ ours.T - wanted).square().sum() < 0.5 * (noisy @ plain.T - wanted).square().sum()


def test_mama_loses_less_than_sparsegpt_and_wanda_and_is_exact():
    weight, samples = layer(outputs=32, inputs=48)
    gram = samples.T @ samples
    for sparsity in (0.5, 0.8):
        ours, mask = mama(weight, gram, sparsity)
        assert int(mask.sum()) == round(weight.numel() * (1 - sparsity))
        assert torch.all(ours[~mask] == 0)
        error = layer_error(weight, ours, gram).sum()
        assert error < layer_error(weight, sparsegpt(weight, gram, sparsity)[0], gram).sum()
        assert error < layer_error(weight, wanda(weight, gram.diagonal().sqrt(), sparsity)[0], gram).sum()


@pytest.mark.parametrize("case", ["dead input", "all dead", "fewer tokens than inputs", "one token"])
def test_degenerate_grams_give_finite_weights(case):
    weight, samples = layer()
    if case == "dead input":
        samples[:, 3] = 0
    elif case == "all dead":
        samples = samples * 0
    else:
        samples = samples[: 5 if case.startswith("fewer") else 1]
    gram = samples.T @ samples
    for solve in (mama, sparsegpt, alps):
        for group in (None, (2, 4)):
            new, mask = solve(weight, gram, 0.5, group)
            assert torch.isfinite(new).all() and int(mask.sum()) == weight.numel() // 2


def test_a_large_mean_beside_a_small_variance_gives_finite_weights(caplog):
    """Centring such a gram leaves rounding that is not positive definite."""
    weight, samples = layer()
    gram = Gram.zeros(16, "cpu")
    gram.add(samples * 1e-3 + 100.0)
    new, mask = mama(weight, gram.centred, 0.5)
    assert torch.isfinite(new).all() and int(mask.sum()) == weight.numel() // 2
