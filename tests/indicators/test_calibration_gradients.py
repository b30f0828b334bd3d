"""The pass of gradients, and the budget that follows from it."""

import pytest
import torch

from mama_trl.config import default_blend
from mama_trl.indicators.calibration_gradients import sensitivities
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import prune
from mama_trl.selection.allocation import allocate
from mama_trl.selection.threshold import kept_count


def test_the_pass_of_gradients_leaves_gradients_alone(make_model, rows):
    model = make_model("llama")
    model(input_ids=rows[:2], labels=rows[:2]).loss.mul(100).backward()
    before = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    targets = find_targets(model)
    fresh = make_model("llama")
    theirs = sensitivities(fresh, rows[:4], find_targets(fresh))
    for name, value in sensitivities(model, rows[:4], targets).items():
        assert torch.equal(value, theirs[name])
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in model.named_parameters())


def test_sensitivities_are_the_mean_of_w_times_g(make_model, rows):
    model = make_model("gpt2").eval()
    targets = find_targets(model)
    ours = sensitivities(model, rows[:8], targets, batch_size=4)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    expected = {t.name: torch.zeros(t.shape) for t in targets}
    for batch in rows[:8].split(4):
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        for t in targets:
            expected[t.name] += (t.matrix * t.oriented(t.parameter.grad)).abs() / 2
    for name, value in expected.items():
        assert torch.allclose(ours[name].float(), value, rtol=0.05, atol=value.max().item() * 0.01)


def test_sensitivity_budget_keeps_the_total_and_differs(make_model, rows):
    model = make_model("llama")
    targets = find_targets(model)
    sizes = [t.shape[0] * t.shape[1] for t in targets]
    found = sensitivities(model, rows[:8], targets)
    shares = dict(zip([t.name for t in targets], allocate([found[t.name] for t in targets], sizes, 0.6, 0.5)))
    kept = sum(kept_count(t.shape[0] * t.shape[1], shares[t.name]) for t in targets)
    assert kept == kept_count(sum(t.shape[0] * t.shape[1] for t in targets), 0.6)
    assert len({round(value, 3) for value in shares.values()}) > 2
    masks = prune(model, rows[:8], sparsity=0.6, progress=False)
    assert masks.sparsity() == pytest.approx(0.6, abs=1e-4)
    blends = [default_blend("gradients", level) for level in (0.5, 0.95, 0.97, 0.99, 0.995)]
    assert blends == pytest.approx([0.6, 0.6, 0.3, 0.0, 0.0])


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "gemma2", "gpt_neox"])
def test_sensitivity_budget_on_other_architectures(make_model, rows, architecture):
    model = make_model(architecture)
    masks = prune(model, rows[:16], sparsity=0.6, progress=False)
    assert masks.verify(model) == 0 and masks.sparsity() == pytest.approx(0.6, abs=1e-3)
    assert all(torch.isfinite(p).all() for p in model.parameters())
