"""`mama run` end to end on a recipe of few steps, stopped and taken up again."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from mama_trl import MamaError, MaskSet
from mama_trl.demo import arithmetic, pipeline
from mama_trl.demo.names import RUN_NAMES
from mama_trl.disk.removal import remove_written

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def recipe(tmp_path):
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    values["output_dir"] = str(tmp_path / "run")
    values["data"].update(
        sequence_length=32, vocab_size=320, characters=60000, calibration_blocks=8, evaluation_blocks=8
    )
    values["model"].update(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=2)
    for stage in ("pretrain", "sft", "grpo", "distill"):
        values[stage]["max_steps"] = 6
    values["grpo"].update(per_device_train_batch_size=16, mask_start=3, learning_rate=1e-3)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_run_goes_on_after_its_last_finished_stage_and_reports(recipe, monkeypatch, capsys):
    # A model of six steps earns nothing, and without a reward there is no attribution.
    def lengths(completions, **kwargs):
        return [float(len(text) % 2) for text in completions]

    monkeypatch.setattr(arithmetic, "correct", lengths)
    work = pipeline.distill
    monkeypatch.setattr(pipeline, "distill", lambda run, label: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_pipeline(recipe)
    monkeypatch.setattr(pipeline, "distill", work)
    page = pipeline.run_pipeline(recipe)
    assert "3/7 sft: done before" in capsys.readouterr().out
    report = json.loads((page.parent / "report.json").read_text())
    for key in ("versions", "seed", "protocol", "stages", "dense", "pruned", "baselines", "corpus"):
        assert report[key] or key == "seed"
    assert [s["name"] for s in report["stages"]] == ["data", "pretrain", "sft", "grpo", "distill", "baselines"]
    assert all(s["seconds"] > 0 for s in report["stages"])
    assert report["pruned"]["sparsity"] == pytest.approx(0.8, abs=0.002)
    assert report["pruned"]["bytes_packed"] < report["pruned"]["bytes"]
    assert set(report["baselines"]) == {"magnitude", "wanda", "sparsegpt"}
    for result in report["baselines"].values():
        assert set(result) == {"oneshot", "distilled"}
        assert result["distilled"]["sparsity"] == pytest.approx(result["oneshot"]["sparsity"])
    assert sum(report["attribution"]["kept"]) + sum(report["attribution"]["pruned"]) == report["model"]["prunable"]
    assert [name for name, _ in report["trajectory"]["stages"]] == ["pretrain", "sft", "grpo", "distill"]
    model = AutoModelForCausalLM.from_pretrained(page.parent / "model")
    assert MaskSet.load(page.parent / "model").verify(model) == 0
    tokenizer = AutoTokenizer.from_pretrained(page.parent / "model")
    prompt = tokenizer("12+30=", return_tensors="pt", add_special_tokens=False)
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt.input_ids.shape[1]
    # Overwriting knows every name that a run writes.
    assert remove_written(page.parent, RUN_NAMES) == [] and not page.parent.exists()


def test_folders_with_something_else_are_refused(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    with pytest.raises(MamaError, match="holds something else"):
        pipeline.run_pipeline(recipe)
    (tmp_path / "run" / "thesis.txt").unlink()
    (tmp_path / "run" / "run.json").write_text("{}")
    with pytest.raises(MamaError, match="other settings"):
        pipeline.run_pipeline(recipe)


@pytest.mark.parametrize(
    "section,key,value",
    [(None, "sparsity", 1.5), (None, "speed", 1), ("data", "colour", 1), ("grpo", "luck", 1), ("grpo", "budget", "x")],
)
def test_bad_recipes_are_said_before_any_compute(recipe, section, key, value, tmp_path):
    values = yaml.safe_load(recipe.read_text())
    (values if section is None else values[section])[key] = value
    recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(MamaError, match=key):
        pipeline.run_pipeline(recipe)
    assert not (tmp_path / "run" / "data").exists()
