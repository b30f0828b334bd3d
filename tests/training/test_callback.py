"""A training run with the callback: zeros after every step, indicators, what is refused."""

import pytest

from mama_trl import MamaConfig, MamaError, MaskSet
from mama_trl.model.targets import find_targets

from ..helpers import train


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("schedule", ["oneshot", "cubic"])
def test_pruned_weights_are_zero_after_every_step(make_model, rows, tmp_path, architecture, schedule):
    ramp = {"mask_end": 6, "mask_interval": 2} if schedule == "cubic" else {}
    config = MamaConfig(sparsity=0.75, mask_schedule=schedule, mask_start=2, **ramp)
    model = make_model(architecture)
    trainer, mama, check = train(model, rows, tmp_path, config)
    assert check.steps >= 6 and check.violations == 0
    assert mama.sparsity == pytest.approx(0.75, abs=0.01)
    assert trainer.state.log_history[0]["mama/sparsity"] == 0.0
    assert trainer.state.log_history[-1]["mama/sparsity"] == pytest.approx(0.75, abs=0.01)
    assert MaskSet.load(tmp_path).digest() == mama.masks.digest()


@pytest.mark.parametrize(
    "changes",
    [
        {"indicators": ["magnitude"], "redistribution": "none", "scope": "row"},
        {"indicators": ["magnitude", "sensitivity=0.5"], "redistribution": "none", "scope": "global"},
        {"scope": "row"},
        {"scope": "row", "redistribution": "mean", "indicators": ["activation", "sensitivity=0.5"]},
        {"indicators": ["curvature"], "redistribution": "none", "budget": "curvature"},
        {"indicators": ["movement"], "redistribution": "none", "statistics": ["movement"], "budget": "uniform"},
        {"indicators": ["activation", "sensitivity"], "redistribution": "mean"},
        {"pattern": "2:4"},
    ],
)
def test_indicators_scopes_and_patterns(make_model, rows, tmp_path, changes):
    config = MamaConfig(**{"sparsity": 0.5, "mask_start": 3, **changes})
    _, mama, check = train(make_model("llama"), rows, tmp_path, config)
    assert check.violations == 0 and mama.sparsity == pytest.approx(0.5, abs=0.02)
    if changes.get("scope") == "row":
        for name in mama.masks.names:
            assert len(mama.masks.mask(name).sum(1).unique()) == 1, name


def test_a_nan_weight_is_named(make_model, rows, tmp_path):
    model = make_model("llama")
    target = find_targets(model)[3]
    target.parameter.data[0, 0] = float("nan")
    with pytest.raises(MamaError, match=target.name.replace(".", r"\.")):
        train(model, rows, tmp_path, MamaConfig())


@pytest.mark.parametrize("optimizer", ["sgd", "adafactor"])
@pytest.mark.parametrize("changes", [{"indicators": ["curvature"], "redistribution": "none"}, {"budget": "curvature"}])
def test_curvature_without_second_moments_is_refused_after_the_first_step(
    make_model, rows, tmp_path, optimizer, changes
):
    config, model = MamaConfig(sparsity=0.5, mask_start=5, **changes), make_model("llama")
    with pytest.raises(MamaError, match="curvature.*keeps nothing"):
        train(model, rows, tmp_path, config, optim=optimizer)


def test_torch_compile(make_model, rows, tmp_path):
    _, mama, check = train(
        make_model("llama"), rows, tmp_path, MamaConfig(sparsity=0.5, mask_start=2), torch_compile=True,
        torch_compile_backend="eager", max_steps=4,
    )
    assert mama.sparsity == pytest.approx(0.5, abs=0.01) and check.violations == 0
    assert not any("_orig_mod" in name for name in mama.masks.names)


def test_targets_that_match_nothing_and_adapters(make_model, rows, tmp_path):
    with pytest.raises(MamaError, match="target_modules.*nothing_like_this"):
        train(make_model("llama"), rows, tmp_path, MamaConfig(target_modules=["nothing_like_this"]))
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(MamaError, match="PEFT"):
        train(model, rows, tmp_path, MamaConfig())


def test_chosen_targets_only(make_model, rows, tmp_path):
    config = MamaConfig(sparsity=0.5, mask_start=2, target_modules=[r"mlp\."], exclude_modules=["down_proj"])
    _, mama, _ = train(make_model("llama"), rows, tmp_path, config)
    assert {name.split(".")[-2] for name in mama.masks.names} == {"gate_proj", "up_proj"}
