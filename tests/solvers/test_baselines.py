"""Magnitude, Wanda, SparseGPT and ALPS, each against its published rule on hand-computed cases."""

import pytest
import torch

from mama_trl.selection.threshold import kept_count
from mama_trl.solvers.alps import alps, next_penalty
from mama_trl.solvers.magnitude import magnitude
from mama_trl.solvers.redistribution import layer_error
from mama_trl.solvers.sparsegpt import BLOCK, sparsegpt
from mama_trl.solvers.wanda import wanda

from ..helpers import layer


def test_wanda_by_hand():
    weight = torch.tensor([[1.0, -5.0, 2.0, 3.0], [4.0, 1.0, -1.0, 2.0]])
    norm = torch.tensor([10.0, 1.0, 1.0, 2.0])
    pruned, _ = wanda(weight, norm, 0.5)
    assert pruned.tolist() == [[1.0, 0.0, 0.0, 3.0], [4.0, 0.0, 0.0, 2.0]]


def test_sparsegpt_equals_its_rule_written_out():
    """Optimal brain surgeon column by column with a fresh inverse of the remaining Hessian each time."""
    weight, samples = layer(outputs=4, inputs=6)
    gram = samples.T @ samples
    hessian = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(6, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    scores = (weight.double().square() / upper.diagonal().square()).flatten()
    mask = torch.ones(24, dtype=torch.bool)
    mask[scores.argsort()[:12]] = False
    mask = mask.view(4, 6)
    expected = weight.double().clone()
    for column in range(6):
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = expected[:, column] * ~mask[:, column] / inverse[0, 0]
        expected[:, column:] -= error.unsqueeze(1) * inverse[0]
    ours, our_mask = sparsegpt(weight, gram, 0.5)
    assert torch.equal(our_mask, mask)
    assert torch.allclose(ours.double(), expected * mask, atol=1e-4, rtol=1e-3)


def obs_by_hand(weight, gram, mask_of):
    """SparseGPT's rule with a fresh inverse of the remaining Hessian at each column, in fp64.

    `mask_of(column, weights so far, diagonal of the factor)` gives new mask columns from `column` on, or None.
    """
    columns = weight.shape[1]
    hessian = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(columns, dtype=torch.float64)
    diagonal = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True).diagonal()
    values, mask = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool)
    for column in range(columns):
        chosen = mask_of(column, values, diagonal)
        if chosen is not None:
            mask[:, column : column + chosen.shape[1]] = chosen
        inverse = torch.linalg.inv(hessian[column:, column:])
        error = values[:, column] * ~mask[:, column] / inverse[0, 0]
        values[:, column:] -= error.unsqueeze(1) * inverse[0]
    return values * mask, mask


def test_sparsegpt_chooses_the_mask_block_by_block_on_compensated_values():
    weight, samples = layer(outputs=3, inputs=BLOCK + 40, tokens=900)
    gram = samples.T @ samples

    def mask_of(column, values, diagonal):
        if column not in (0, BLOCK):
            return None
        inside = slice(column, min(column + BLOCK, values.shape[1]))
        scores = (values[:, inside] / diagonal[inside]).square()
        mask = torch.zeros(scores.numel(), dtype=torch.bool)
        mask[scores.flatten().argsort(descending=True)[: kept_count(scores.numel(), 0.6)]] = True
        return mask.view(scores.shape)

    expected, mask = obs_by_hand(weight, gram, mask_of)
    ours, our_mask = sparsegpt(weight, gram, 0.6)
    assert torch.equal(our_mask, mask)
    assert torch.allclose(ours.double(), expected, atol=1e-3, rtol=1e-2)


def test_sparsegpt_chooses_each_group_of_n_m_when_its_turn_comes():
    weight, samples = layer(outputs=5, inputs=12)
    gram = samples.T @ samples

    def mask_of(column, values, diagonal):
        if column % 4:
            return None
        scores = (values[:, column : column + 4] / diagonal[column : column + 4]).square()
        worst = scores.argsort(dim=1)[:, :2]
        return torch.ones(scores.shape, dtype=torch.bool).scatter_(1, worst, False)

    expected, mask = obs_by_hand(weight, gram, mask_of)
    ours, our_mask = sparsegpt(weight, gram, 0.5, (2, 4))
    assert torch.equal(our_mask, mask)
    assert torch.allclose(ours.double(), expected, atol=1e-4, rtol=1e-3)


def test_magnitude_by_hand():
    weight = torch.tensor([[1.0, -5.0, 2.0], [4.0, 0.5, -3.0]])
    assert magnitude(weight, 0.5)[0].tolist() == [[0.0, -5.0, 0.0], [4.0, 0.0, -3.0]]


def test_alps_penalty_schedule():
    """ρ grows by 1.3, 1.2 or 1.1 by the number of changed connections against 0.1 k, 0.005 k and 1."""
    assert [next_penalty(1.0, changed, 1000) for changed in (100, 99, 5, 4, 1, 0)] == [1.3, 1.2, 1.2, 1.1, 1.1, 1.0]


def test_alps_ends_at_the_optimum_of_its_support():
    """The values are least squares on the support, in the damped problem that ALPS solves."""
    weight, samples = layer(outputs=8, inputs=16)
    gram = samples.T @ samples
    new, mask = alps(weight, gram, 0.5)
    assert int(mask.sum()) == 64 and torch.all(new[~mask] == 0)
    damped = gram.double() + 0.01 * gram.diagonal().mean().double() * torch.eye(16, dtype=torch.float64)
    for row in range(8):
        support = mask[row].nonzero().squeeze(1)
        right = damped[support] @ weight[row].double()
        exact = torch.linalg.solve(damped[support][:, support], right)
        assert torch.allclose(new[row, support].double(), exact, atol=0.05, rtol=0.05)


def test_alps_moves_nothing_between_orthogonal_inputs():
    weight = torch.tensor([[1.0, -5.0, 2.0, 3.0], [4.0, 1.0, -1.0, 2.0]])
    new, mask = alps(weight, torch.diag(torch.tensor([100.0, 1.0, 1.0, 4.0])), 0.5)
    assert int(mask.sum()) == 4 and bool(mask[:, 0].all())  # the input a hundred times stronger is kept by both
    assert torch.allclose(new, weight * mask, atol=1e-4)


def test_alps_is_better_than_sparsegpt():
    weight, samples = layer(outputs=32, inputs=48)
    gram = samples.T @ samples
    for sparsity, group in ((0.5, None), (0.8, None), (0.5, (2, 4))):
        ours = layer_error(weight, alps(weight, gram, sparsity, group)[0], gram).sum()
        assert ours < layer_error(weight, sparsegpt(weight, gram, sparsity, group)[0], gram).sum()


@pytest.mark.parametrize("sparsity", [0.0, 0.005, 0.01])
def test_alps_where_nearly_everything_is_kept(sparsity):
    for seed in range(4):
        torch.manual_seed(seed)
        weight, samples = torch.randn(16, 32), torch.randn(200, 32)
        new, mask = alps(weight, samples.T @ samples, sparsity)
        assert torch.isfinite(new).all() and int(mask.sum()) == kept_count(512, sparsity)


def test_sparsegpt_takes_an_exact_count_over_several_blocks():
    weight, samples = layer(outputs=10, inputs=300, tokens=900)
    _, mask = sparsegpt(weight, samples.T @ samples, 0.7)
    assert int(mask.sum()) == 900
