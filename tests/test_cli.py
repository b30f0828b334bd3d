"""The command line: help, bad input in one sentence and exit code 2, and the commands without training."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mama_trl.cli import COMMANDS, TRAINING, main
from mama_trl.errors import MamaError
from mama_trl.evaluation import loading
from mama_trl.evaluation.rewards import accuracy, last_number
from mama_trl.masks.maskset import MaskSet
from mama_trl.scripts import data, launch, training_parser

from .tiny_tokenizer import tiny_tokenizer

TEXT = "\n\n".join(f"{a} plus {b} makes {a + b}, and {b} plus {a} too." for a in range(12) for b in range(12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model` (a tiny Llama), `train.txt`, `held.txt`, `empty.txt`, `noweights`."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    config.save_pretrained(root / "noweights")
    (root / "train.txt").write_text(TEXT)
    (root / "held.txt").write_text(TEXT[: len(TEXT) // 3])
    (root / "empty.txt").write_text(" \n")
    (root / "empty.jsonl").touch()
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    return root


def refused(capsys, *argv) -> str:
    """Runs `mama argv`, which must fail with exit code 2 and one line on stderr; returns that line."""
    assert main([str(item) for item in argv]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    sentences = [line for line in err if line.startswith("mama: ")]
    assert len(sentences) == 1 and "Traceback" not in "\n".join(err)
    return sentences[0]


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


@pytest.mark.parametrize("command", list(TRAINING))
def test_help_of_training_commands(command, capsys):
    assert main([command, "--help"]) == 0
    short = capsys.readouterr().out
    assert "--sparsity" in short and "--dataset_name" in short and "--accelerate_config" in short
    assert main([command, "--help_all"]) == 0
    assert len(capsys.readouterr().out) > 3 * len(short)


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
    assert parts["budget"] == {"gradients", "uniform", "reward", "weights and biases"}
    assert found["steps", "mama"] == found["redistribution", "least_squares"] == found["budget", "gradients"]
    assert len(set(found.values())) > 10
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100 + len(str(tmp_path))
    leave_statistics(slice(1))
    assert "belongs to another model" in refused(capsys, *arguments, "--overwrite")


def test_report_and_run_without_their_files(tmp_path, capsys):
    assert "report.json does not exist" in refused(capsys, "report", tmp_path)
    (tmp_path / "report.json").write_text("{")
    assert "no valid JSON" in refused(capsys, "report", tmp_path)
    assert "is no file" in refused(capsys, "run", tmp_path / "recipe.yaml")


# ---------------------------------------------------------------------- training commands


@pytest.mark.parametrize("change, said", [
    (["--sparsity", "1.5"], "`sparsity` is 1.5"),
    (["--indicators", "magnitud"], "`indicators` is 'magnitud'"),
    (["--model_name_or_path", "{root}/noweights"], "holds no weights"),
    (["--dataset_name", "{root}/missing.csv"], "missing.csv does not exist"),
    (["--dataset_name", "{root}/empty.jsonl"], "an empty file"),
    (["--dataset_train_split", "trian"], "`dataset_train_split` is 'trian'"),
    (["--output_dir", "{root}"], "already holds something"),
    (["--use_peft"], "`use_peft` is set"),
    (["--learning_rat", "1"], "--learning_rate"),
    (["--config", "{root}/missing.yaml"], "cannot be read"),
    (["--accelerate_config", "zero9"], "single, ddp, zero1, zero2, zero3, zero3-offload, fsdp2, two-node"),
    (["--accelerate_config", "ddp", "--num_proceses", "2"], "--num_processes"),
    (["--resume_from_checkpoint", "{root}/nowhere"], "is no folder"),
    (["--prompt_template", "{{nothing}}", "--dataset_name", "{root}/train.txt"], "`prompt_template` does not fit"),
])
def test_training_refuses_before_it_starts(folder, capsys, change, said):
    base = [
        "sft", "--model_name_or_path", folder / "model", "--dataset_name", folder / "train.txt",
        "--output_dir", folder / "new", "--use_cpu", "true",
    ]
    assert said in refused(capsys, *base, *(item.format(root=folder) for item in change))
    assert not (folder / "new").exists()


def test_config_with_an_unknown_name(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsiti: 0.5\n")
    assert "Did you mean sparsity?" in refused(capsys, "sft", "--config", recipe)
    recipe.write_text("- a\n")
    assert "holds no `name: value` lines" in refused(capsys, "sft", "--config", recipe)


def test_flags_override_the_config(tmp_path):
    from mama_trl.scripts import sft

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("sparsity: 0.25\nlearning_rate: 3e-5\nmask_schedule: cubic\nmask_interval: 7\nuse_cpu: true\n")
    config, _, args, *_ = training_parser.parse(sft.make_parser(), ["--config", str(recipe), "--sparsity", "0.75"])
    assert (config.sparsity, config.mask_interval, args.learning_rate) == (0.75, 7, 3e-5)


def test_distill_wants_a_teacher_and_grpo_a_reward(folder, tmp_path, capsys):
    base = ["--model_name_or_path", folder / "model", "--output_dir", tmp_path / "new", "--use_cpu", "true"]
    text = ["--dataset_name", folder / "train.txt"]
    assert "`teacher_model_name_or_path` is missing" in refused(capsys, "distill", *base, *text)
    small = ["--num_generations", "2", "--per_device_train_batch_size", "2"]
    assert "no column `prompt`" in refused(capsys, "grpo", *base, *text, *small)
    assert "cannot be imported" in refused(capsys, "grpo", *base, *text, *small, "--reward_funcs", "no.such.thing")


def test_launch_arguments(tmp_path):
    from mama_trl.scripts import sft

    parser = sft.make_parser()
    argv = ["--config", "x.yaml", "--accelerate_config", "ddp", "--num_processes", "2", "--sparsity", "0.5"]
    got = launch.launch_arguments(parser, "ddp", ["--num_processes", "2"], argv)
    assert got[0] == "--config_file" and got[1].endswith("accelerate_configs/ddp.yaml")
    assert got[2:] == [
        "--num_processes", "2", "--module", "mama_trl.cli", "sft", "--config", "x.yaml", "--sparsity", "0.5",
    ]
    with pytest.raises(MamaError, match="neither a file nor one of"):
        launch.accelerate_file("zero9")


def test_pretrain_from_scratch_then_resume(folder, tmp_path, capsys):
    """A folder without weights is enough; an earlier run is never overwritten by accident, and can be gone on with."""
    start = tmp_path / "start"
    LlamaConfig.from_pretrained(folder / "model").save_pretrained(start)
    tiny_tokenizer().save_pretrained(start)
    run = [
        "pretrain", "--model_name_or_path", start, "--from_scratch", "true", "--dataset_name", folder / "train.txt",
        "--output_dir", tmp_path / "base", "--max_length", "32", "--save_steps", "2",
        "--use_cpu", "true", "--sparsity", "0.5", "--per_device_train_batch_size", "4", "--calibration_tokens", "256",
    ]
    run = [str(item) for item in run]
    assert main([*run, "--max_steps", "2"]) == 0
    capsys.readouterr()
    assert "--resume_from_checkpoint true" in refused(capsys, *run, "--max_steps", "4")
    assert main([*run, "--max_steps", "4", "--resume_from_checkpoint", "true"]) == 0
    masks = MaskSet.load(tmp_path / "base")
    assert masks.verify(AutoModelForCausalLM.from_pretrained(tmp_path / "base")) == 0
    state = json.loads((tmp_path / "base" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4


@pytest.mark.slow
def test_accelerate_config_starts_a_process(folder, tmp_path):
    run = [
        "sft", "--accelerate_config", "single", "--mixed_precision", "no", "--model_name_or_path", folder / "model",
        "--dataset_name", folder / "train.txt", "--output_dir", tmp_path / "out", "--max_steps", "1",
        "--max_length", "32", "--use_cpu", "true", "--sparsity", "0",
    ]
    assert main([str(item) for item in run]) == 0
    assert (tmp_path / "out" / "model.safetensors").exists()


# ---------------------------------------------------------------------- data and rewards


def test_with_prompts():
    from datasets import Dataset

    rows = Dataset.from_dict({"question": ["1+1?"], "answer": ["#### 2"]})
    assert data.with_prompts(rows, None, False, True)[0] == {"prompt": "1+1?", "completion": " #### 2"}
    templated = data.with_prompts(rows, "Q: {question}\n", False, False)[0]
    assert templated["prompt"] == "Q: 1+1?\n" and templated["answer"] == "#### 2"
    chat = data.with_prompts(rows, None, True, True)[0]
    assert chat["prompt"] == [{"role": "user", "content": "1+1?"}]
    assert chat["completion"] == [{"role": "assistant", "content": "#### 2"}]
    text = Dataset.from_dict({"text": ["a"]})
    assert data.with_prompts(text, None, False, True) is text


def test_accuracy_reads_the_final_answer():
    answers = ["3 + 4 = 7\n#### 7", "#### 1,200", "18", "yes", "0.5"]
    said = ["so it is 7.", "that makes $1,200.00", r"\boxed{18} and 3", "yes", "#### .50"]
    assert accuracy(completions=said, answer=answers) == [1.0] * 5
    wrong = ["7 or 8", "120", r"18 \boxed{3}", "no", ""]
    assert accuracy(completions=wrong, answer=answers) == [0.0] * 5
    messages = [[{"role": "assistant", "content": "It is 7"}]]
    assert accuracy(completions=messages, answer=["#### 7"]) == [1.0]


def test_last_number():
    assert [str(last_number(t)) for t in ("-3", "x", "1,000 and 2.50", "$4")] == ["-3", "None", "2.50", "4"]
