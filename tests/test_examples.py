"""The examples run as their headers say, here with fewer steps."""

import ast
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "examples"
FEWER = {
    "sft_callback": (dict(steps=12), 0.7),
    "grpo_pruning": (dict(steps=4, warm_up=20), 0.5),
    "prune_and_distill": (dict(steps=4, dense_steps=20), 0.9),
}


def test_there_are_three_and_each_says_what_and_how():
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(FEWER)
    for path in FOLDER.glob("*.py"):
        header = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        for part in ("What:", "How (", f"python examples/{path.name}", "In your own run:"):
            assert part in header, (path.name, part)


@pytest.mark.parametrize("name", FEWER)
def test_it_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes, sparsity = FEWER[name]
    found = runpy.run_path(str(FOLDER / f"{name}.py"))["main"](**changes)
    assert found["sparsity"] == pytest.approx(sparsity, abs=0.01)
    assert found["pruned connections that are not zero"] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
def test_distillation_heals(tmp_path, monkeypatch):
    """At full length: what pruning costs comes back."""
    monkeypatch.chdir(tmp_path)
    found = runpy.run_path(str(FOLDER / "prune_and_distill.py"))["main"](method="magnitude", sparsity=0.85)
    assert found["pruned"] < 0.7 * found["dense"] and found["distilled"] > found["pruned"]
