"""The pass of gradients."""

import torch

from mama_trl.indicators.calibration_gradients import sensitivities
from mama_trl.model.targets import find_targets


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
