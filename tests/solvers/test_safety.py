"""Solvers on inputs that no gram should have: finite, the exact count, and never worse than dropping.

Errors are taken from the inputs themselves, in the arithmetic of a model, so that a solver cannot hide behind its gram.
"""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mama_trl.errors import warn_once
from mama_trl.pruning.prune import prune
from mama_trl.selection.threshold import kept_count
from mama_trl.solvers.alps import alps
from mama_trl.solvers.magnitude import magnitude
from mama_trl.solvers.mama import mama, stand_in
from mama_trl.solvers.problem import Gram
from mama_trl.solvers.redistribution import (
    bias_shift,
    centred,
    centred_cross,
    layer_error,
    least_squares,
    mean,
    safer_rows,
    unit_diagonal,
)
from mama_trl.solvers.sparsegpt import sparsegpt
from mama_trl.solvers.wanda import wanda

INPUTS = (
    "plain", "constant", "nearly constant", "duplicate", "zero", "all zero", "fewer tokens than inputs", "one token",
    "large mean", "twelve orders", "all alike",
)
WEIGHTS = ("plain", "zero rows", "bf16", "all zero", "twelve orders")
cases = settings(max_examples=60, deadline=None)


def inputs_of(kind: str, count: int, generator) -> torch.Tensor:
    """(tokens, count), fp32."""
    tokens = {"fewer tokens than inputs": 5, "one token": 1}.get(kind, 300)
    samples = torch.randn(tokens, count, generator=generator) @ torch.randn(count, count, generator=generator)
    if kind == "constant":
        samples[:, 2], samples[:, 5] = 3.7, -1e3
    elif kind == "nearly constant":
        samples[:, 2] = 100 + 1e-3 * samples[:, 2]
        samples[:, 5] = 100 + 0.3 * samples[:, 5]
    elif kind == "duplicate":
        samples[:, 1] = samples[:, 0]
        samples[:, 6] = -2 * samples[:, 4]
    elif kind == "zero":
        samples[:, [0, 3]] = 0
    elif kind == "all zero":
        samples *= 0
    elif kind == "large mean":
        samples = samples * 1e-3 + 100
    elif kind == "twelve orders":
        samples *= torch.logspace(-6, 6, count)
    elif kind == "all alike":
        samples = samples[:, :1].expand(-1, count) + 1e-4 * samples
    return samples


def weight_of(kind: str, outputs: int, count: int, generator) -> torch.Tensor:
    weight = torch.randn(outputs, count, generator=generator)
    if kind == "zero rows":
        weight[::2] = 0
    elif kind == "bf16":
        weight = weight.bfloat16().float()
    elif kind == "all zero":
        weight *= 0
    elif kind == "twelve orders":
        weight *= 10.0 ** (12 * torch.rand(weight.shape, generator=generator) - 6)
    return weight


@st.composite
def layers(draw):
    """(weight, inputs) and how to prune: (sparsity, group, by_row)."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    count = draw(st.sampled_from([8, 16, 24]))
    samples = inputs_of(draw(st.sampled_from(INPUTS)), count, generator)
    weight = weight_of(draw(st.sampled_from(WEIGHTS)), draw(st.sampled_from([1, 4, 13])), count, generator)
    pattern = draw(st.sampled_from(["matrix", "row", "2:4", "1:4"]))
    group = {"2:4": (2, 4), "1:4": (1, 4)}.get(pattern)
    sparsity = 1 - group[0] / group[1] if group else draw(st.sampled_from([0.0, 0.1, 0.5, 0.7, 0.9, 0.97]))
    return weight, samples, sparsity, group, pattern == "row", generator


def counted(samples: torch.Tensor) -> Gram:
    gram = Gram.zeros(samples.shape[1], "cpu")
    for batch in samples.split(64):
        gram.add(batch)
    return gram


def check_count(mask, sparsity, group, by_row=False, truncated=False):
    outputs, count = mask.shape
    if group:
        assert (mask.view(outputs, -1, group[1]).sum(-1) == group[0]).all()
    elif truncated:
        assert (mask.sum(1) == count - int(count * sparsity)).all()
    elif by_row:
        assert (mask.sum(1) == kept_count(count, sparsity)).all()
    else:
        assert int(mask.sum()) == kept_count(mask.numel(), sparsity)


def off(samples, new, bias, wanted) -> torch.Tensor:
    """‖X W'ᵀ + b' − Y‖² of each row, the outputs in fp32 as a model computes them."""
    return ((samples @ new.t() + bias).double() - wanted).square().sum(0)


def never_above(samples, weight, new, mask, new_bias=0.0, bias=0.0, wanted=None):
    """The error of each row against that of dropping, up to what fp32 makes of the sums in it."""
    if wanted is None:
        wanted = samples.double() @ weight.double().t() + bias
    ours, theirs = off(samples, new, new_bias, wanted), off(samples, weight * mask, bias, wanted)
    sums = weight.abs().double() @ samples.double().norm(dim=0)
    assert (ours <= 1.001 * theirs + 1e-5 * (sums.square() + wanted.square().sum(0))).all(), (ours, theirs)


@cases
@given(layers())
def test_baselines_are_finite_and_exact(layer):
    weight, samples, sparsity, group, by_row, _ = layer
    gram = counted(samples)
    found = {
        "magnitude": magnitude(weight, sparsity, group), "wanda": wanda(weight, gram.norm, sparsity, group),
        "sparsegpt": sparsegpt(weight, gram.gram, sparsity, group), "alps": alps(weight, gram.gram, sparsity, group),
    }
    for name, (new, mask) in found.items():
        assert torch.isfinite(new).all(), name
        assert (new[~mask] == 0).all(), name
        check_count(mask, sparsity, group, truncated=name == "wanda")


@cases
@given(layers(), st.booleans())
def test_mama_is_finite_and_exact_and_never_worse_than_dropping(layer, factors):
    weight, samples, sparsity, group, by_row, generator = layer
    gram = counted(samples)
    importance = 10.0 ** (12 * torch.rand(weight.shape, generator=generator) - 6) if factors else None
    new, mask = mama(weight, gram.gram, sparsity, group, importance, by_row=by_row)
    assert torch.isfinite(new).all() and (new[~mask] == 0).all()
    check_count(mask, sparsity, group, by_row)
    never_above(samples, weight, new, mask)


@cases
@given(layers())
def test_mama_with_goals_is_never_worse_than_dropping(layer):
    weight, samples, sparsity, group, by_row, generator = layer
    gram = counted(samples)
    wanted = samples @ weight.t() + samples.abs().mean() * torch.randn(len(samples), len(weight), generator=generator)
    new, mask = mama(weight, gram.gram, sparsity, group, cross=wanted.t() @ samples, by_row=by_row)
    assert torch.isfinite(new).all() and (new[~mask] == 0).all()
    check_count(mask, sparsity, group, by_row)
    never_above(samples, weight, new, mask, wanted=wanted.double())


@cases
@given(layers(), st.booleans())
def test_mama_with_a_bias_is_never_worse_than_dropping(layer, goals):
    weight, samples, sparsity, group, by_row, generator = layer
    stats = counted(samples)
    bias = torch.randn(len(weight), generator=generator)
    outputs = samples @ weight.t() + bias
    if goals:
        outputs += samples.abs().mean() * torch.randn(outputs.shape, generator=generator)
    gram, constant = centred(stats.gram, stats.total, stats.tokens)
    middle = outputs.mean(0)
    cross = centred_cross(outputs.t() @ samples, stats.total, middle, constant) if goals else None
    new, mask = mama(weight, gram, sparsity, group, cross=cross, by_row=by_row)
    assert torch.isfinite(new).all() and (new[~mask] == 0).all()
    check_count(mask, sparsity, group, by_row)
    never_above(samples, weight, new, mask, middle - new @ stats.mean, bias, outputs.double())


@cases
@given(layers())
def test_what_moves_values_on_a_given_mask_is_never_worse_than_dropping(layer):
    weight, samples, sparsity, group, by_row, _ = layer
    stats = counted(samples)
    _, mask = magnitude(weight, sparsity, group)
    fitted = least_squares(weight, stats.gram, mask)
    spread = mean(weight, mask, stats.gram)
    for new in (fitted, spread):
        assert torch.isfinite(new).all() and (new[~mask] == 0).all()
        never_above(samples, weight, new, mask)
    dropped = weight * mask
    never_above(samples, weight, dropped, mask, bias_shift(weight, dropped, stats.mean))


def test_a_constant_input_leaves_its_share_to_the_bias():
    """Its centred variance is rounding, on which any weight is free."""
    torch.manual_seed(0)
    samples = torch.randn(4000, 12)
    samples[:, 3], samples[:, 7] = 41.7, -3e3
    weight, bias = torch.randn(6, 12), torch.randn(6)
    stats = counted(samples)
    gram, constant = centred(stats.gram, stats.total, stats.tokens)
    assert constant.nonzero().flatten().tolist() == [3, 7]
    assert (gram[constant] == 0).all() and (gram[:, constant] == 0).all()
    exact = samples - samples.mean(0)
    assert torch.allclose(gram[~constant][:, ~constant], (exact.t() @ exact)[~constant][:, ~constant], atol=0.1)
    new, mask = mama(weight, gram, 0.5)
    assert not mask[:, constant].any()  # the bias has their mean, so they are the first to go
    middle = weight @ stats.mean + bias - new @ stats.mean
    assert new.abs().max() < 3 * weight.abs().max()
    assert (samples @ new.t() + middle - samples @ weight.t() - bias).square().mean() < 3


def test_rounding_of_long_sums_is_below_what_counts_as_constant():
    samples = torch.full((500_000, 2), 0.1)
    samples[:, 1] = 1 + 0.01 * torch.randn(500_000, generator=torch.Generator().manual_seed(0))
    stats = Gram.zeros(2, "cpu")
    for batch in samples.split(2048):
        stats.add(batch)
    gram, constant = centred(stats.gram, stats.total, stats.tokens)
    assert constant.tolist() == [True, False]
    assert gram[1, 1].item() == pytest.approx(50, rel=0.1)


def test_a_row_worse_than_dropping_is_dropped_and_said_once(caplog):
    weight = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]])
    mask = torch.tensor([[False, True]] * 3)
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    best, wild = torch.tensor([0.0, 2.5]), torch.tensor([0.0, 1e19])
    new = torch.stack([best, wild, torch.full((2,), torch.nan)])
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            safe = safer_rows(weight, new, weight * mask, gram)
    assert safe.tolist() == [[0.0, 2.5], [0.0, 2.0], [0.0, 2.0]]
    assert len(caplog.records) == 1
    goal = torch.tensor([[0.0, 9.0]] * 3)  # of outputs 9 x₂: now 2.5 is nearer than 2, and 1e19 is still not
    assert safer_rows(weight, new, weight * mask, gram, goal)[:2].tolist() == [[0.0, 2.5], [0.0, 2.0]]


def test_an_input_that_is_never_active_goes_first_and_keeps_its_weight_where_it_stays():
    torch.manual_seed(0)
    samples = torch.randn(200, 8)
    samples[:, 5] = 0
    weight = torch.randn(4, 8)
    weight[:, 5] = 100.0
    gram = samples.t() @ samples
    _, mask = mama(weight, gram, 4 / 32)
    assert not mask[:, 5].any() and int(mask.sum()) == 28
    wanted = samples @ weight.t()
    for cross in (None, wanted.t() @ samples):
        new, mask = mama(weight, gram, 2 / 32, cross=cross)
        assert int(mask[:, 5].sum()) == 2
        assert torch.allclose(new[mask[:, 5], 5], torch.tensor(100.0), rtol=1e-4)


def test_inputs_that_others_can_stand_in_for_count_less():
    torch.manual_seed(0)
    samples = torch.randn(4000, 4)
    samples[:, 1] = samples[:, 0] + 0.1 * samples[:, 1]
    scaled, _ = unit_diagonal(samples.t() @ samples, 1e-2)
    half = stand_in(scaled, 0.5)
    assert half[:2].max() < 0.5 < 0.9 < half[2:].min() and half.max() <= 1
    ridge = scaled + 0.08 * torch.eye(4)
    assert torch.allclose(half, (torch.linalg.inv(ridge).diagonal() * 1.09) ** -0.5, atol=1e-4)
    assert (stand_in(scaled, 0.9)[:2] > half[:2]).all()  # nine of ten helpers will be gone
    assert torch.allclose(stand_in(torch.eye(4) * 1.01, 0.5), torch.ones(4), atol=1e-5)


def test_mama_is_at_most_two_percent_above_alps():
    """Correlated inputs of unequal size, as layers of language models have them."""
    generator = torch.Generator().manual_seed(0)
    for sparsity in (0.5, 0.7, 0.9):
        ratios = []
        for _ in range(3):
            mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -1.5, 64).unsqueeze(1)
            samples = torch.randn(2000, 64, generator=generator) @ mixing
            weight, gram = torch.randn(96, 64, generator=generator), samples.t() @ samples
            ours, theirs = (layer_error(weight, solve(weight, gram, sparsity)[0], gram).sum() for solve in (mama, alps))
            ratios.append(float(ours / theirs))
        assert sum(ratios) / 3 <= 1.02, (sparsity, ratios)


def test_wanda_prunes_the_truncated_count_of_each_row():
    """Of five inputs at 0.5 the authors prune int(2.5) = 2 a row, at 0.3 int(1.5) = 1."""
    weight = torch.tensor([[5.0, 4.0, 3.0, 2.0, 1.0], [-1.0, 2.0, -3.0, 4.0, -5.0]])
    norm = torch.ones(5)
    assert wanda(weight, norm, 0.5)[0].tolist() == [[5.0, 4.0, 3.0, 0.0, 0.0], [0.0, 0.0, -3.0, 4.0, -5.0]]
    assert wanda(weight, norm, 0.3)[1].sum(1).tolist() == [4, 4]
    assert wanda(torch.randn(3, 128), torch.ones(128), 0.6)[1].sum(1).tolist() == [52] * 3  # 76 of 128 go, not 77


def test_a_budget_may_leave_nothing_of_a_matrix(make_model, rows):
    """As at sparsities that only few connections of the whole model are left at."""
    scaled, _ = unit_diagonal(torch.eye(4) + 0.5, 1e-2)
    assert torch.equal(stand_in(scaled, 1.0), torch.ones(4))
    masks = prune(make_model("llama"), rows, "mama", 0.9995, progress=False)
    assert masks.sparsity() == pytest.approx(0.9995, abs=1e-3)
