"""The command line: help, bad input in one sentence and exit code 2, and the commands without training."""

import json

import pytest
from transformers import AutoModelForCausalLM

from mama_trl.cli import COMMANDS, TRAINING, main
from mama_trl.evaluation import loading
from mama_trl.masks.maskset import MaskSet

from .conftest import refused


def test_overview_names_every_command(capsys):
    assert main([]) == 0 and main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("mama_trl 0.")


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in TRAINING])
def test_help_of_plain_commands(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: mama {command}" in capsys.readouterr().out


def test_unknown_command_suggests_the_nearest(capsys):
    assert "did you mean `mama prune`?" in refused(capsys, "prun")
    assert "use one of pretrain" in refused(capsys, "xyzzy")


@pytest.mark.parametrize("change, said", [
    (["--sparsity", "1.0"], r"`sparsity` is 1.0"),
    (["--sparsity", "-0.1"], r"`sparsity` is -0.1"),
    (["--sparsity", "nan"], "is no number"),
    (["--method", "wonda"], "magnitude, wanda, sparsegpt, alps, mama"),
    (["--budget", "fair"], "`budget` is 'fair'"),
    (["--pattern", "4:2"], "`pattern` is '4:2'"),
    (["--calibration", "{root}/empty.txt"], "holds no text"),
    (["--calibration", "{root}/binary.txt"], "not readable as UTF-8"),
    (["--calibration", "{root}/missing.txt"], "missing.txt does not exist"),
    (["--output", "{root}"], "already holds something"),
    (["--output", "{root}/model", "--overwrite"], "the model's own folder"),
    (["--output", "{root}/train.txt"], "is a file"),
    (["--sparsty", "0.5"], "--sparsty"),
])
def test_prune_refuses_before_it_starts(folder, capsys, monkeypatch, change, said):
    monkeypatch.setattr(loading, "load_model", lambda *a: pytest.fail("the model was loaded"))
    base = ["prune", folder / "model", "--calibration", folder / "train.txt", "--output", folder / "new"]
    line = refused(capsys, *base, *(item.format(root=folder) for item in change))
    assert said in line
    assert not (folder / "new").exists()


def test_models_that_cannot_be_loaded(folder, capsys):
    rest = ["--text", folder / "held.txt"]
    assert "holds no weights" in refused(capsys, "evaluate", folder / "noweights", *rest)
    assert "holds no config.json" in refused(capsys, "evaluate", folder, *rest)
    assert "does not exist" in refused(capsys, "evaluate", folder / "nothing", *rest)
    assert "is a file" in refused(capsys, "evaluate", folder / "train.txt", *rest)


def test_missing_arguments_are_one_sentence(folder, capsys):
    assert "--output" in refused(capsys, "prune", folder / "model")
    assert "calibration" in refused(capsys, "prune", folder / "model", "--output", folder / "new")
    assert "--text" in refused(capsys, "evaluate", folder / "model")
    assert "`levels` is '0.5,x'" in refused(
        capsys, "levels", folder / "model", "--calibration", folder / "train.txt", "--text", folder / "held.txt",
        "--levels", "0.5,x", "--output", folder / "new",
    )


@pytest.mark.parametrize("options, sparsity", [
    (["--sparsity", "0.7", "--method", "magnitude"], 0.7),
    (["--sparsity", "0.75", "--method", "wanda"], 0.75),
    (["--sparsity", "0.9", "--method", "sparsegpt"], 0.9),
    (["--sparsity", "0.9", "--method", "mama"], 0.9),
    (["--sparsity", "0.9", "--method", "alps"], 0.9),
    (["--sparsity", "0.8", "--budget", "gradients"], 0.8),
    (["--pattern", "2:4"], 0.5),
])
def test_prune_then_evaluate(folder, tmp_path, capsys, options, sparsity):
    pruned = tmp_path / "pruned"
    arguments = ["prune", folder / "model", "--calibration", folder / "train.txt", "--output", pruned, *options]
    assert main([str(item) for item in arguments]) == 0
    model, masks = AutoModelForCausalLM.from_pretrained(pruned), MaskSet.load(pruned)
    assert masks.verify(model) == 0
    assert masks.sparsity() == pytest.approx(sparsity, abs=0.01)
    if "2:4" in options:
        groups = masks.mask("model.layers.0.mlp.up_proj.weight").view(32, 4, 4).sum(-1)
        assert bool((groups == 2).all())

    capsys.readouterr()
    numbers = tmp_path / "numbers.json"
    assert main(["evaluate", str(pruned), "--text", str(folder / "held.txt"), "--json", str(numbers)]) == 0
    out, result = capsys.readouterr().out, json.loads(numbers.read_text())
    assert result["sequence_length"] == 32  # the model's own context
    assert result["sparsity"]["all"] == pytest.approx(sparsity, abs=0.01)
    assert result["bytes"] == (pruned / "model.safetensors").stat().st_size
    assert result["tokens"] % 31 == 0
    assert "perplexity" in out and "blocks of 32" in out and "up_proj" in out


def test_overwrite_leaves_no_stale_weights(folder, tmp_path):
    output = tmp_path / "pruned"
    output.mkdir()
    (output / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    (output / "notes.txt").write_text("mine")
    arguments = ["prune", folder / "model", "--method", "magnitude", "--output", output, "--overwrite"]
    assert main([str(item) for item in arguments]) == 0
    assert not (output / "model-00001-of-00002.safetensors").exists()
    assert (output / "notes.txt").read_text() == "mine"


def test_report_and_run_without_their_files(tmp_path, capsys):
    assert "report.json does not exist" in refused(capsys, "report", tmp_path)
    (tmp_path / "report.json").write_text("{")
    assert "no valid JSON" in refused(capsys, "report", tmp_path)
    assert "is no file" in refused(capsys, "run", tmp_path / "recipe.yaml")
