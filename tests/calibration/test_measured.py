"""What pruning a matrix alone costs, as measured by running the model behind it."""

import math

import pytest
import torch
from torch.nn.functional import kl_div

from mama_trl import prune
from mama_trl.calibration.measured import FACTORS, _Tail, measured_losses
from mama_trl.errors import MamaError
from mama_trl.model.blocks import find_blocks
from mama_trl.model.targets import find_targets
from mama_trl.selection.allocation import BINS, curve_histogram, shares_by_loss
from mama_trl.solvers.magnitude import magnitude
from mama_trl.solvers.problem import Solution
from tests.conftest import tiny

ROWS = torch.randint(2, 384, (12, 24), generator=torch.Generator().manual_seed(3))


def by_magnitude(target, inputs, sparsity):
    return Solution(*magnitude(target.matrix.float(), sparsity))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "mixtral", "gemma3"])
def test_the_divergence_is_that_of_the_whole_model_and_nothing_is_left_changed(architecture):
    model = tiny(architecture).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    blocks = [block for _, block in find_blocks(model)]
    parts = [ROWS[:1], ROWS[1:2]]
    with torch.no_grad():
        tail = _Tail(model, parts)
        dense = [model(part).logits.log_softmax(-1) for part in parts]
        for index in range(len(blocks)):
            tail.advance(index)
            assert tail.divergence() == pytest.approx(0, abs=1e-6)
            target = next(t for t in find_targets(model, experts=True) if t.block == index)
            weight = target.matrix.clone()
            target.matrix.mul_(0.1)
            now = [model(part).logits.log_softmax(-1) for part in parts]
            expected = sum(float(kl_div(n, d, log_target=True, reduction="sum")) for n, d in zip(now, dense)) / 48
            assert tail.divergence() == pytest.approx(expected, rel=1e-4, abs=1e-7)
            target.matrix.copy_(weight)
    targets = find_targets(model, experts=True)
    counts = measured_losses(model, ROWS, targets, 0.6, by_magnitude)
    assert counts.shape == (len(targets), BINS) and not model.training
    for target, row in zip(targets, counts):
        size = target.shape[0] * target.shape[1]
        assert int(row.sum()) == 0 or abs(int(row.sum()) - size) <= BINS ** 0.5  # rounded bin by bin
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_curve_becomes_a_histogram_by_hand():
    # From density 0.5 to 1 the loss falls from 2 to 0 in a line: 500 connections of 0.004 each; the rest is dearer.
    counts = curve_histogram([0.5], [2.0], 1000)
    place = int(torch.tensor(0.004).view(torch.int32)) >> 18
    dear = int(torch.tensor(0.04).view(torch.int32)) >> 18
    assert int(counts[place - 1 : place + 2].sum()) == 500 and int(counts[dear - 1 : dear + 2].sum()) == 500
    # A loss that rises with density is flattened: nothing kept later is dearer than what was kept before.
    counts = curve_histogram([0.2, 0.5], [1.0, 3.0], 1000)
    assert int(counts.sum()) == pytest.approx(1000, abs=40)
    # Of two matrices the one whose loss is ten times as high is pruned less, and together as much as was asked for.
    densities = [factor * 0.5 for factor in FACTORS[:-1]]
    curves = [[scale * math.exp(-5 * d) for d in densities] for scale in (1.0, 10.0)]
    histograms = torch.stack([curve_histogram(densities, curve, 1000) for curve in curves])
    cheap, dear = shares_by_loss(histograms, [1000, 1000], 0.5, blend=1.0, shrink=0.0)
    assert cheap > 0.6 > 0.4 > dear and cheap + dear == pytest.approx(1.0, abs=2e-3)


def test_what_nothing_hangs_on_is_pruned_most():
    model = tiny("llama").eval()
    idle = model.model.layers[0].mlp
    idle.down_proj.weight.data.mul_(1e-4)  # whatever gate and up compute arrives nowhere
    masks = prune(model, ROWS, sparsity=0.6, budget="measured", budget_blend=1.0, progress=False, batch_size=4)
    assert masks.sparsity() == pytest.approx(0.6, abs=1e-3)
    names = [name for name in masks.names if "layers.0.mlp" in name]
    others = [masks.sparsity(name) for name in masks.names if name not in names]
    assert min(masks.sparsity(name) for name in names) > 0.85 and sum(others) / len(others) < 0.55


def test_it_wants_calibration_and_is_not_for_training():
    from mama_trl import MamaConfig

    with pytest.raises(MamaError, match="budget measured"):
        prune(tiny("llama"), method="magnitude", budget="measured")
    with pytest.raises(MamaError, match="`budget` is 'measured'"):
        MamaConfig(budget="measured")
