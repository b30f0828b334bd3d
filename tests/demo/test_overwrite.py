"""`mama run --overwrite` deletes what an earlier run wrote, and nothing else, whatever folder it is given."""

import json
import os
from pathlib import Path

import pytest
import yaml

from mama_trl.cli import main
from mama_trl.demo import claim as claim_module
from mama_trl.demo import pipeline
from mama_trl.demo.claim import claim
from mama_trl.demo.names import PICTURES, RUN_NAMES
from mama_trl.demo.recipe import RunConfig
from mama_trl.disk.removal import MODEL_NAMES, remove_written
from mama_trl.disk.writing import write_json
from mama_trl.errors import MamaError
from mama_trl.report.plots import PLOTS

from .. import test_outputs
from ..faults import ROOT, Reached, refused, tree, unchanged

place, halted = test_outputs.place, test_outputs.halted  # fixtures


@pytest.fixture
def recipe(place):
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    values["output_dir"] = str(place / "run")
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    return place / "recipe.yaml"


def finished_run(recipe: Path) -> Path:
    """A folder as a run leaves it, with something of a user's in it."""
    folder = recipe.parent / "run"
    for name in (
        "data/rows.safetensors", "sft/model.safetensors", "sft/mama/masks.safetensors", "report.html", "report.json",
        "model/packed/model.safetensors", "grpo/checkpoint-5/optimizer.pt", "baselines/stage.json", "sparsity_map.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("ours")
    write_json(folder / "run.json", RunConfig.read(recipe).settings())
    return folder


def test_overwriting_deletes_what_a_run_wrote_and_only_that(recipe, halted, caplog):
    folder = finished_run(recipe)
    for name in ("notes.txt", "sft/notes.txt", "pictures/cat.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    os.symlink(recipe.parent / "teacher", folder / "elsewhere")
    with unchanged(recipe.parent / "teacher"):
        assert "is a link" in _refusal_of_run(recipe)
        (folder / "elsewhere").unlink()
        with pytest.raises(Reached):
            main(["run", str(recipe), "--overwrite"])
    assert sorted(tree(folder)) == ["notes.txt", "pictures", "pictures/cat.png", "run.json", "sft", "sft/notes.txt"]
    assert "keeps what no run wrote" in caplog.text


def test_a_run_that_is_named_through_a_link_is_overwritten_too(recipe, halted, capsys, monkeypatch):
    """Its finished stages would pass for the new run's."""
    folder = finished_run(recipe)
    os.symlink(folder, recipe.parent / "linked")
    argv = ["run", str(recipe), "--overwrite", "--output_dir", str(recipe.parent / "linked")]
    monkeypatch.setattr(claim_module, "remove_written", lambda *_: [folder / "baselines" / "stage.json"])
    assert "cannot be deleted" in refused(capsys, *argv)
    monkeypatch.undo()
    monkeypatch.setattr(pipeline, "_stages", lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(argv)
    assert sorted(tree(folder)) == ["run.json"] and (recipe.parent / "linked").is_symlink()


def test_a_kill_while_the_old_run_is_deleted_leaves_a_folder_of_ours(recipe, halted, monkeypatch):
    folder = finished_run(recipe)
    monkeypatch.setattr(claim_module, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["run", str(recipe), "--overwrite"])
    monkeypatch.undo()
    assert sorted(tree(folder)) == ["run.json"]
    claim(RunConfig.read(recipe), overwrite=True)


def _refusal_of_run(recipe: Path, *flags) -> str:
    with pytest.raises(MamaError) as caught:
        pipeline.run_pipeline(recipe, True, **dict(zip(flags[::2], flags[1::2])))
    return str(caught.value)


@pytest.mark.parametrize("output", [
    "/", ".", "..", "~", "{p}", "{p}/work", "{p}/model", "{p}/train.txt", "{p}/recipe.yaml", "",
])
def test_no_other_folder_is_ever_touched(recipe, halted, capsys, monkeypatch, output):
    monkeypatch.chdir(recipe.parent / "work")
    monkeypatch.setenv("HOME", str(recipe.parent / "teacher"))
    with unchanged(recipe.parent):
        refused(capsys, "run", recipe, "--overwrite", "--output_dir", output.format(p=recipe.parent))


@pytest.mark.parametrize("stored", [
    "", "{", "null", "[]", "5", "{}", '{"name": "x"}', '{"format": "other"}', "[" * 9999,
])
def test_a_run_file_of_another_program_is_no_licence_to_delete(recipe, halted, capsys, stored):
    folder = recipe.parent / "run"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "theirs.txt").write_text("x")
    (folder / "run.json").write_text(stored)
    with unchanged(recipe.parent):
        refused(capsys, "run", recipe)
        assert "yourself" in refused(capsys, "run", recipe, "--overwrite")


def test_a_run_of_an_earlier_version_is_known(recipe, halted):
    folder = finished_run(recipe)
    stored = json.loads((folder / "run.json").read_text())
    del stored["format"]
    (folder / "run.json").write_text(json.dumps(stored))
    with pytest.raises(Reached):
        pipeline.run_pipeline(recipe)  # goes on
    claim(RunConfig.read(recipe), overwrite=True)
    assert sorted(tree(folder)) == ["run.json"]


def test_a_mistake_in_a_section_leaves_the_old_run(recipe, halted, capsys):
    finished_run(recipe)
    values = yaml.safe_load(recipe.read_text())
    for section, name, value in (
        ("grpo", "learning_rate", -1), ("distill", "max_steps", 0), ("model", "hidden_size", "x"),
    ):
        recipe.write_text(yaml.safe_dump({**values, section: {**values[section], name: value}}))
        with unchanged(recipe.parent):
            assert name in refused(capsys, "run", recipe, "--overwrite")


def test_a_recipe_that_the_run_would_write_over(recipe, halted, capsys):
    folder = finished_run(recipe)
    with unchanged(recipe.parent):
        assert "written into" in refused(capsys, "run", folder / "run.json", "--overwrite")
    (folder / "recipe.yaml").write_text(recipe.read_text())
    with pytest.raises(Reached):
        main(["run", str(folder / "recipe.yaml")])


def test_names_are_those_that_a_run_writes():
    assert set(PICTURES) == {f"{name}.png" for name in PLOTS}
    assert RUN_NAMES["run.json"] is None and RUN_NAMES["grpo"]["config.json"] is None


def test_removal_follows_no_links_and_keeps_what_it_does_not_know(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text("x")
    folder = tmp_path / "ours"
    (folder / "checkpoint-1" / "mama").mkdir(parents=True)
    for name in ("config.json", "checkpoint-1/config.json", "checkpoint-1/mama/state.json", "mine.txt"):
        (folder / name).write_text("x")
    os.symlink(tmp_path / "theirs", folder / "checkpoint-2")
    os.symlink(tmp_path / "theirs" / "config.json", folder / "model.safetensors")
    stays = remove_written(folder, MODEL_NAMES)
    assert sorted(path.name for path in stays) == ["checkpoint-2", "mine.txt", "model.safetensors"]
    assert (tmp_path / "theirs" / "config.json").read_text() == "x"
    assert remove_written(tmp_path / "nothing", MODEL_NAMES) == []
