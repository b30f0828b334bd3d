"""Every recipe of docs/extend.md runs as it stands, adds its thing from outside, and prunes a tiny model with it."""

import copy
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from mama_trl import MamaError, MaskSet, config, prune
from mama_trl.calibration.grams import collect
from mama_trl.engines import detect
from mama_trl.export import formats
from mama_trl.indicators import formulas, trajectory
from mama_trl.indicators.recorded import recorded
from mama_trl.model.targets import find_targets
from mama_trl.selection.patterns import matrix_mask
from mama_trl.selection.threshold import kept_count
from mama_trl.solvers import methods, redistribution
from mama_trl.training import schedule

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extend.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## ([^\n]+)\n(?:(?!^## ).)*?^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
NAMES = [
    "An indicator that follows from the weight and the layer's inputs", "An indicator that a training run records",
    "A one-shot method", "A redistribution", "A schedule", "A regime", "An engine", "An export format",
]
TABLES = [
    (config, "INDICATORS"), (config, "STATISTICS"), (config, "READS_INPUTS"), (config, "REDISTRIBUTIONS"),
    (config, "SCHEDULES"), (formulas, "COMPUTED"), (trajectory, "RULES"), (methods, "METHODS"),
    (redistribution, "MOVES"), (schedule, "RAMPS"), (detect, "VIEWS"), (formats, "FORMATS"),
]


@pytest.fixture
def recipe(make_model, rows, tmp_path, monkeypatch):
    """Runs one block of the page with what its reader brings; the tables are as they were afterwards."""
    monkeypatch.chdir(tmp_path)
    before = [(getattr(module, name), copy.copy(getattr(module, name))) for module, name in TABLES]

    def run(name: str, dtype: torch.dtype = torch.float32, **changes) -> dict:
        model = make_model("llama").to(dtype)
        values = dict(
            output_dir="out", use_cpu=True, max_steps=8, per_device_train_batch_size=4, logging_steps=1, report_to=[],
            learning_rate=1e-2, save_strategy="no", disable_tqdm=True, seed=0,
        )
        space = {
            "model": model, "dense": copy.deepcopy(model), "tokens": rows[:16],
            "args": TrainingArguments(**{**values, **changes}),
            "data": Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch"),
        }
        exec(compile(RECIPES[name], f"docs/extend.md: {name}", "exec"), space)
        return space

    yield run
    for table, entries in before:
        table.clear()
        table.extend(entries) if isinstance(table, list) else table.update(entries)


def first_gram(space):
    """Target and gram of the first layer, whose inputs no pruning changes; MAMA reads all of so few tokens."""
    targets = find_targets(space["dense"])[:1]
    with torch.no_grad():
        grams = collect(space["dense"], targets, lambda: space["dense"](input_ids=space["tokens"]))
    return targets[0], grams[targets[0].name]


def test_the_page_has_these_recipes_and_each_is_short():
    assert list(RECIPES) == NAMES
    for name, code in RECIPES.items():
        assert len([line for line in code.splitlines() if line.strip()]) <= 30, name
    assert PAGE.count("```python") == len(NAMES)


def test_indicator_of_the_inputs(recipe):
    space = recipe(NAMES[0])
    target, gram = first_gram(space)
    hessian = gram.gram.double() + 0.01 * gram.gram.diagonal().mean() * torch.eye(target.shape[1])
    cost = target.matrix.detach().double().square() / torch.linalg.inv(hessian).diagonal()
    kept = space["masks"].mask(target.name)
    assert cost[kept].min() >= cost[~kept].max() and int(kept.sum()) == kept_count(kept.numel(), 0.5)
    assert space["masks"].verify(space["model"]) == 0
    redistributed = copy.deepcopy(space["dense"])
    masks = prune(redistributed, space["tokens"], sparsity=0.5, indicators=["surgeon"], progress=False)
    assert masks.verify(redistributed) == 0 and masks.digest() != space["masks"].digest()


def test_indicator_of_a_run(recipe):
    space = recipe(NAMES[1], save_strategy="steps", save_steps=8)
    mama = space["mama"]
    assert mama.masks.verify(space["model"]) == 0 and mama.sparsity == pytest.approx(0.5, abs=0.01)
    assert mama.config.recorded == ["sensitivity", "peaks"] and int(mama.trajectory.counts["peaks"]) == 8
    found = recorded("out/checkpoint-8", space["model"], find_targets(space["model"]))["peaks"]
    for name, value in mama.trajectory.values["peaks"].items():
        if name in found:
            assert torch.equal(found[name], value.float().sqrt().sqrt()), name


def test_method(recipe):
    space = recipe(NAMES[2])
    target, gram = first_gram(space)
    size = target.matrix.detach().abs()
    score = (size / size.sum(0) + size / size.sum(1, keepdim=True)) * gram.norm.sqrt()
    assert torch.equal(space["masks"].mask(target.name), matrix_mask(score, 0.5, by_row=True))
    assert "RIA" in {method.label for method in methods.METHODS.values()} and "ria" in methods.overview()


def test_redistribution(recipe):
    space = recipe(NAMES[3])
    target, gram = first_gram(space)
    new = dict(space["model"].named_parameters())[target.name].detach()
    mask, weight = space["masks"].mask(target.name), target.matrix.detach()
    plain = copy.deepcopy(space["dense"])
    theirs = prune(plain, space["tokens"], sparsity=0.5, redistribution="none", budget="uniform", progress=False)
    assert torch.equal(mask, theirs.mask(target.name))
    factor = torch.where(mask, new / weight, 0).sum(1) / mask.sum(1)
    assert torch.allclose(new, weight * mask * factor.unsqueeze(1), atol=1e-5) and factor.std() > 0

    def error(kept):
        return (((weight - kept) @ gram.gram) * (weight - kept)).sum(1)

    assert (error(new) <= error(weight * mask) * (1 + 1e-5)).all()


def test_schedule(recipe):
    space = recipe(NAMES[4])
    levels = [row["mama/sparsity"] for row in space["trainer"].state.log_history if "mama/sparsity" in row]
    assert levels[:8] == pytest.approx([0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 0.75], abs=0.01)
    with pytest.raises(MamaError, match="`mask_end` is 2.0, before `mask_start`"):
        config.MamaConfig(mask_schedule="linear", mask_start=5, mask_end=2)


def test_regime(recipe, make_model, rows):
    space = recipe(NAMES[5], save_strategy="steps", save_steps=3)
    mama, levels = space["mama"], [row.get("mama/sparsity") for row in space["trainer"].state.log_history]
    assert mama.masks.verify(space["model"]) == 0 and mama.sparsity == pytest.approx(0.75, abs=0.01)
    assert levels[:7] == [0.0] * 7
    duals = mama.run.regime_tensors
    assert len(duals) == len(mama.run.targets) and all(bool(dual.abs().sum() > 0) for dual in duals.values())
    resumed = space["MamaCallback"](space["MamaConfig"](sparsity=0.75), regime=space["Proximal"])
    again = Trainer(make_model("llama", seed=9), args=space["args"], train_dataset=space["data"], callbacks=[resumed])
    again.train(resume_from_checkpoint="out/checkpoint-6")
    assert resumed.masks.digest() == mama.masks.digest()
    # The pull has made what the mask prunes smaller than training alone would have.
    pulled = load_file("out/checkpoint-6/model.safetensors")
    small = dict(use_cpu=True, max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], seed=0)
    args = TrainingArguments("plain", save_strategy="no", **small)
    plain = Trainer(space["dense"], args=args, train_dataset=space["data"])
    plain.train()
    free = plain.model.state_dict()
    for name in mama.masks.names:
        pruned = ~mama.masks.mask(name)
        assert pulled[name][pruned].norm() < 0.85 * free[name][pruned].norm(), name


def test_engine(recipe):
    space = recipe(NAMES[6], dtype=torch.bfloat16)
    mama = space["mama"]
    assert mama.run.engine == "copied" and mama.sparsity == pytest.approx(0.5, abs=0.01)
    assert mama.masks.verify() == 0  # in the copies that the optimizer updates, and in the model
    for target in mama.run.targets:
        pruned = ~mama.masks.mask(target.name)
        assert bool((target.parameter[pruned] == 0).all()) and bool((target.parameter.copied[pruned] == 0).all())
        assert torch.equal(target.parameter.copied.bfloat16(), target.parameter)
    assert MaskSet.load("out").digest() == mama.masks.digest()


def test_format(recipe):
    space = recipe(NAMES[7])
    stored, dense = load_file(space["folder"] / "rows.safetensors"), space["model"].state_dict()
    for name in space["masks"].names:
        parts = [stored[f"{name}/{part}"] for part in ("begins", "columns", "values")]
        assert torch.equal(torch.sparse_csr_tensor(*parts, dense[name].shape).to_dense(), dense[name])
    assert (space["folder"] / "config.json").is_file()
