"""`prune`: every method on every architecture, patterns, redistribution, bad input."""

import sys

import pytest
import torch

from mama_trl.calibration import stagewise
from mama_trl.errors import MamaError
from mama_trl.evaluation.perplexity import perplexity
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import prune
from mama_trl.solvers.methods import METHODS


def test_mama_reads_calibration_of_every_kind(make_model, rows, monkeypatch):
    """It reads half of the blocks: where the first are text and the last a task, some of both."""
    seen = []
    original = stagewise.stagewise
    monkeypatch.setattr(
        sys.modules[prune.__module__], "stagewise",
        lambda model, rows, *rest: seen.append(rows) or original(model, rows, *rest),
    )
    kinds = torch.cat([rows[:32], rows[:32] * 0 + 7])
    prune(make_model("llama"), kinds, sparsity=0.5, progress=False)
    of_the_task = (seen[0] == 7).all(1)
    assert len(seen[0]) < 64 and of_the_task.sum() * 2 == len(seen[0])


def test_inputs_with_infinity_are_said(make_model, rows):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[0] = float("inf")
    with pytest.raises(MamaError, match="NaN or infinity"):
        prune(model, rows[:4], "mama", 0.5, progress=False, budget="uniform")


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_architecture(make_model, rows, architecture, method):
    model = make_model(architecture)
    embedding = model.get_input_embeddings().weight.clone()
    masks = prune(model, rows[:16], method, 0.6, progress=False)
    assert masks.verify(model) == 0
    assert set(masks.names) == {t.name for t in find_targets(model)}
    assert masks.sparsity() == pytest.approx(0.6, abs=0.02)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert torch.isfinite(torch.tensor(perplexity(model, rows[:4])["nats"]))


@pytest.mark.parametrize("method", METHODS)
def test_two_of_four(make_model, rows, method):
    model = make_model("llama")
    masks = prune(model, rows[:8], method, pattern="2:4", progress=False)
    for target in find_targets(model):
        groups = masks.mask(target.name).view(target.shape[0], -1, 4)
        assert torch.all(groups.sum(-1) == 2)


@pytest.mark.parametrize("redistribution", ["none", "mean", "bias", "least_squares"])
def test_redistribution_modes(make_model, rows, redistribution):
    model = make_model("opt" if redistribution == "bias" else "llama")
    dense = {t.name: t.matrix.clone() for t in find_targets(model)}
    masks = prune(model, rows[:16], "mama", 0.5, redistribution=redistribution, progress=False)
    changed = any(
        not torch.equal(t.matrix[masks.mask(t.name)], dense[t.name][masks.mask(t.name)]) for t in find_targets(model)
    )
    assert changed == (redistribution in ("mean", "least_squares"))
    assert masks.verify(model) == 0


def test_bf16_weights_stay_bf16(make_model, rows):
    model = make_model("llama").bfloat16()
    prune(model, rows[:8], "mama", 0.5, progress=False)
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in model.parameters())


def test_bad_input_is_said(make_model, rows):
    for arguments, word in [
        ({"method": "obd"}, "method"),
        ({"sparsity": 1.2}, "sparsity"),
        ({"pattern": "4:2"}, "pattern"),
        ({"redistribution": "sum"}, "redistribution"),
        ({"redistribution": "bias"}, "no layer to prune has one"),
        ({"scope": "global"}, "scope"),
        ({"scope": "row", "method": "wanda"}, "`scope` is 'row', which method Wanda does not take"),
        ({"indicators": ["reward"]}, "which no training run left"),
        ({"budget": "reward"}, "which no training run left"),
    ]:
        with pytest.raises(MamaError, match=word):
            prune(make_model("qwen3"), rows, **arguments)
    with pytest.raises(MamaError, match="calibration"):
        prune(make_model("llama"), None, "wanda")
