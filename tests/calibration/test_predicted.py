"""What losing a connection would cost, as predicted from gradients at outputs and the worth of inputs."""

import pytest
import torch

from mama_trl import prune
from mama_trl.calibration.output_gradients import output_gradients
from mama_trl.calibration.worth import input_worths
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import predicted_losses
from mama_trl.solvers.redistribution import worth_of_inputs


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_neox", "opt"])
def test_gradients_at_outputs_are_those_of_autograd(make_model, rows, architecture):
    model, sequences = make_model(architecture), rows[:3]
    ours = output_gradients(model, sequences, find_targets(model))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    expected: dict[str, torch.Tensor] = {}
    for row in sequences.split(1):
        outputs: dict[str, torch.Tensor] = {}
        handles = [
            t.module.register_forward_hook(lambda _, args, out, t=t: outputs.__setitem__(t.name, out))
            for t in find_targets(model)
        ]
        loss = torch.nn.functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="sum")
        for handle in handles:
            handle.remove()
        for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values()))):
            square = gradient.reshape(-1, gradient.shape[-1]).square().sum(0) / sequences.numel()
            expected[name] = expected.get(name, 0) + square
    assert set(ours) == set(expected)
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=1e-3, atol=1e-9), name


def test_experts_are_heard_through_the_router(make_model, rows):
    model = make_model("mixtral")
    targets = find_targets(model, experts=True)
    found = output_gradients(model, rows[:6], targets)
    assert all(bool((found[t.name] > 0).any()) for t in targets)
    assert all("forward" not in vars(module) for module in model.modules())


def test_the_worth_of_an_input_is_what_losing_it_costs_when_the_others_are_refitted():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(300, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    worth = worth_of_inputs(samples.T @ samples, damping=0.0)
    for lost in range(6):
        rest = [j for j in range(6) if j != lost]
        fitted = torch.linalg.lstsq(samples[:, rest].double(), samples[:, lost : lost + 1].double())
        error = (samples[:, rest].double() @ fitted.solution - samples[:, lost : lost + 1]).square().sum()
        assert worth[lost].item() == pytest.approx(error.item(), rel=1e-3)


def test_inputs_that_are_never_active_are_worth_nothing():
    samples = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    samples[:, 2] = 0
    assert worth_of_inputs(samples.T @ samples)[2] == 0
    assert torch.isfinite(worth_of_inputs(torch.zeros(4, 4))).all()
    assert torch.isfinite(worth_of_inputs(samples[:1].T @ samples[:1])).all()


def test_worths_leave_the_model_alone_and_name_every_layer(make_model, rows):
    model = make_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    targets = find_targets(model)
    found = input_worths(model, rows[:8], targets)
    assert {t.name: tuple(found[t.name].shape) for t in targets} == {t.name: (t.shape[1],) for t in targets}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_oss", "gemma2", "gpt_neox", "gpt2"])
def test_the_default_budget_differs_from_uniform_and_keeps_the_total(make_model, rows, architecture):
    model = make_model(architecture)
    targets = find_targets(model, experts=True)
    counts = predicted_losses(model, rows[:16], targets)
    for target, row in zip(targets, counts):  # an expert that few sequences did not reach is known nothing of
        assert int(row.sum()) in (0, target.shape[0] * target.shape[1])
    masks = prune(model, rows[:16], sparsity=0.6, progress=False)
    assert masks.verify(model) == 0 and masks.sparsity() == pytest.approx(0.6, abs=1e-3)
    assert len({round(masks.sparsity(name), 3) for name in masks.names}) > 2
    assert all(torch.isfinite(p).all() for p in model.parameters())
