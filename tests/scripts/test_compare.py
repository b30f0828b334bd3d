"""`mama levels` and `mama ablation`."""

import json

import torch
from transformers import AutoModelForCausalLM

from mama_trl.cli import main

from ..tiny_tokenizer import tiny_tokenizer
from .conftest import refused


def test_levels_writes_table_and_plot(folder, tmp_path, capsys):
    arguments = [
        "levels", folder / "model", "--calibration", folder / "train.txt", "--text", folder / "held.txt",
        "--levels", "0.9,0.5", "--methods", "magnitude,mama", "--seeds", "0,1", "--output", tmp_path / "levels",
    ]
    assert main([str(item) for item in arguments]) == 0
    result = json.loads((tmp_path / "levels" / "levels.json").read_text())
    assert len(result["trials"]) == 8 and [row["seeds"] for row in result["rows"]] == [2] * 4
    names = {path.suffix for path in (tmp_path / "levels").iterdir()}
    assert {".csv", ".json", ".png"} <= names
    out = capsys.readouterr().out
    assert "magnitude" in out.lower() and "mama" in out.lower()


def test_ablation_changes_one_part_at_a_time(folder, tmp_path, capsys):
    """With statistics of a run beside the model, the reward stands against the fixed indicator."""
    from mama_trl.engines.detect import shards_of
    from mama_trl.indicators.trajectory import Trajectory
    from mama_trl.model.targets import find_targets

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    source = tmp_path / "model"
    model.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    torch.manual_seed(0)

    def leave_statistics(cut: slice) -> None:
        parameters = [(t.name, torch.nn.Parameter(t.parameter.detach()[cut])) for t in find_targets(model)]
        trajectory = Trajectory(shards_of(parameters), ["reward"])
        for value in trajectory.values["reward"].values():
            value.copy_(torch.rand(value.shape))
        trajectory.save(source)

    leave_statistics(slice(None))
    arguments = [
        "ablation", source, "--calibration", folder / "train.txt", "--text", folder / "held.txt", "--levels", "0.7",
        "--calibration_tokens", "512", "--blocks", "4", "--output", tmp_path / "ablation",
    ]
    assert main([str(item) for item in arguments]) == 0
    rows = json.loads((tmp_path / "ablation" / "ablation.json").read_text())["rows"]
    found = {(row["part"], row["method"]): row["nats"] for row in rows}
    parts = {part: {method for p, method in found if p == part} for part, _ in found}
    indicators = {"magnitude", "activation", "sensitivity", "reward"}
    assert parts["one indicator alone"] == indicators
    assert parts["one of all taken away"] == {"all", *(f"without {name}" for name in indicators)}
    assert parts["redistribution"] == {"none", "mean", "least_squares"}  # this Llama has no biases
    assert parts["fixed against reward"] == {"weights and biases", "reward"}
    assert parts["budget"] == {"predicted", "uniform", "reward", "weights and biases"}
    assert found["steps", "mama"] == found["redistribution", "least_squares"] == found["budget", "predicted"]
    assert len(set(found.values())) > 10
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100 + len(str(tmp_path))
    leave_statistics(slice(1))
    assert "belongs to another model" in refused(capsys, *arguments, "--overwrite")
