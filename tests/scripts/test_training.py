"""The training commands: options, recipes, launchers, resume."""

import json

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from mama_trl.cli import TRAINING, main
from mama_trl.errors import MamaError
from mama_trl.masks.maskset import MaskSet
from mama_trl.scripts import launch, training_parser

from ..tiny_tokenizer import tiny_tokenizer
from .conftest import refused


@pytest.mark.parametrize("command", list(TRAINING))
def test_help_of_training_commands(command, capsys):
    assert main([command, "--help"]) == 0
    short = capsys.readouterr().out
    assert "--sparsity" in short and "--dataset_name" in short and "--accelerate_config" in short
    assert main([command, "--help_all"]) == 0
    assert len(capsys.readouterr().out) > 3 * len(short)


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
