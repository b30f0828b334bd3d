"""Models with code of their own: refused with a true sentence, and with --trust_remote_code every command runs."""

import json

import pytest

from mama_trl.cli import main

from .peers import made
from .peers.files import share, weights_in

CODE = '''
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()  # shows that this was run

class MineConfig(LlamaConfig):
    model_type = "mine"

class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
'''
TRAIN = "--use_cpu true --bf16 false --report_to none --max_steps 2 --per_device_train_batch_size 4 --max_length 32"


@pytest.fixture
def folder(tmp_path):
    """`mine`, a model whose config.json names code beside it, and texts."""
    made.saved(tmp_path / "mine")
    path = tmp_path / "mine" / "config.json"
    config = json.loads(path.read_text()) | {
        "model_type": "mine", "architectures": ["MineForCausalLM"],
        "auto_map": {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"},
    }
    path.write_text(json.dumps(config))
    (tmp_path / "mine" / "mine.py").write_text(CODE.format(marker=str(tmp_path / "was run")))
    (tmp_path / "text.txt").write_text("\n\n".join(row["text"] for row in made.rows("text") * 4))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made.rows("prompts")))
    return tmp_path


COMMANDS = {
    "evaluate": "evaluate {root}/mine --text {root}/text.txt --sequence_length 32",
    "prune": "prune {root}/mine --sparsity 0.5 --calibration {root}/text.txt --output {root}/out "
    "--sequence_length 32",
    "levels": "levels {root}/mine --calibration {root}/text.txt --text {root}/text.txt --output {root}/out "
    "--levels 0.5 --methods magnitude --sequence_length 32",
    "sft": "sft --model_name_or_path {root}/mine --dataset_name {root}/text.txt --output_dir {root}/out --sparsity 0.5 "
    + TRAIN,
    "pretrain": "pretrain --model_name_or_path {root}/mine --dataset_name {root}/text.txt --output_dir {root}/out "
    "--from_scratch true " + TRAIN,
    "grpo": "grpo --model_name_or_path {root}/mine --dataset_name {root}/prompts.jsonl --output_dir {root}/out "
    "--num_generations 2 --max_completion_length 4 " + TRAIN.replace(" --max_length 32", ""),
    "distill": "distill --model_name_or_path {root}/mine --teacher_model_name_or_path {root}/mine "
    "--dataset_name {root}/text.txt --output_dir {root}/out --mask_schedule oneshot --sparsity 0.5 " + TRAIN,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_code_is_run_only_where_it_is_trusted(command, folder, capsys):
    words = COMMANDS[command].format(root=folder).split()
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "wants to run code of its own" in said and "--trust_remote_code" in said
    assert not (folder / "was run").exists()
    value = [] if command in ("evaluate", "prune", "levels") else ["true"]
    assert main([*words, "--trust_remote_code", *value]) == 0
    assert (folder / "was run").exists()
    if command in ("prune", "sft", "distill", "grpo"):
        stored = weights_in(folder / "out")
        inner = {n: v == 0 for n, v in stored.items() if ".layers." in n and v.ndim == 2}
        assert share(inner) == pytest.approx(0.5, abs=0.01)


def test_a_teacher_alone_that_has_code(folder, capsys):
    made.saved(folder / "plain")
    words = COMMANDS["distill"].format(root=folder)
    words = words.replace(f"_path {folder}/mine --teacher", f"_path {folder}/plain --teacher")
    assert main(words.split()) == 2
    assert "mine wants to run code of its own" in capsys.readouterr().err
    assert main([*words.split(), "--trust_remote_code", "true"]) == 0
