"""Models, tokenizers and names of models that are not what they say: one sentence before anything is computed."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForSequenceClassification

from mama_trl.evaluation.loading import check_model_source, load_model, load_tokenizer

from .conftest import DENSE, MIXTURES, tiny
from .faults import command_line, furnish, refusal, refused, tiny_model, unchanged


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`dense`: a tiny model's folder."""
    root = tmp_path_factory.mktemp("broken")
    tiny_model(root / "dense")
    return root


def changed_config(**changes):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def changed_weights(edit):
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        edit(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def with_a_head_beside_the_tied_one(folder: Path) -> None:
    changed_config(tie_word_embeddings=True)(folder)
    changed_weights(lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"] + 1}))(folder)


def sharded(folder: Path) -> None:
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def bad_index(text: str):
    def change(folder: Path) -> None:
        sharded(folder)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def bytes_in(name: str, data: bytes):
    return lambda folder: (folder / name).write_bytes(data)


def evil_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(os.system))


MODELS = {
    "five layers asked, two there": (changed_config(num_hidden_layers=5), "lack model.layers.2"),
    "one layer asked, two there": (changed_config(num_hidden_layers=1), "beside it model.layers.1"),
    "other width": (changed_config(intermediate_size=48), "another shape"),
    "other vocabulary": (changed_config(vocab_size=999), "another shape"),
    "a head that is tied": (with_a_head_beside_the_tied_one, "a lm_head.weight of its own"),
    "absurd vocabulary": (changed_config(vocab_size=10**12), "another shape"),
    "absurd depth": (changed_config(num_hidden_layers=10**9), "num_hidden_layers"),
    "negative depth": (changed_config(num_hidden_layers=-1), "beside it"),
    "no heads": (changed_config(num_attention_heads=0), "config.json"),
    "text for a number": (changed_config(hidden_size="x"), "hidden_size"),
    "no such dtype": (changed_config(dtype="float33"), "float33"),
    "no such type": (changed_config(model_type="nope"), "nope"),
    "a classifier's name": (changed_config(architectures=["LlamaForSequenceClassification"]), "no causal language"),
    "no architecture's name": (changed_config(architectures="x"), "no causal language model"),
    "a picture model": (changed_config(model_type="vit", architectures=None), "no causal language model"),
    "code of its own": (changed_config(model_type="foo", auto_map={"AutoConfig": "x.C"}), "--trust_remote_code"),
    "config null": (bytes_in("config.json", b"null"), "describes no model"),
    "config a list": (bytes_in("config.json", b"[]"), "describes no model"),
    "config cut": (bytes_in("config.json", b'{"a"'), "no readable JSON"),
    "config binary": (bytes_in("config.json", b"\xff\xfe\x00"), "no readable JSON"),
    "config without end": (bytes_in("config.json", b"[" * 10**5), "no readable JSON"),
    "weights empty": (bytes_in("model.safetensors", b""), "no readable weights"),
    "weights zeros": (bytes_in("model.safetensors", bytes(1000)), "no readable weights"),
    "weights absurd": (bytes_in("model.safetensors", b"\xff" * 1000), "no readable weights"),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 9000), "no readable weights"),
    "weights of nothing": (lambda f: save_file({}, f / "model.safetensors"), "lack"),
    "a tensor gone": (changed_weights(lambda w: w.pop("model.norm.weight")), "lack model.norm.weight"),
    "a tensor more": (changed_weights(lambda w: w.update(extra=torch.zeros(2))), "beside it extra"),
    "a tensor reshaped": (changed_weights(lambda w: w.update({"model.norm.weight": torch.ones(5)})), "model.norm"),
    "whole numbers": (changed_weights(lambda w: w.update({n: v.int() for n, v in w.items()})), "whole numbers"),
    "a shard gone": (sharded, "is missing"),
    "index null": (bad_index("null"), "is damaged"), "index cut": (bad_index("{"), "is damaged"),
    "index of nothing": (bad_index('{"weight_map": {}}'), "or none"),
    "index of elsewhere": (bad_index('{"weight_map": {"a": "../model.safetensors"}}'), "other folders"),
    "a pickle that runs": (evil_pickle, "no readable weights"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_that_are_not_what_they_say(root, tmp_path, kind):
    change, said = MODELS[kind]
    folder = tmp_path / "model"
    shutil.copytree(root / "dense", folder)
    change(folder)
    with unchanged(folder), refusal(said):
        check_model_source(str(folder))
    loads = ("a classifier's name", "no architecture's name", "whole numbers", "a head that is tied")
    if kind not in loads:
        with refusal("."):
            load_model(str(folder))


def test_a_refusal_after_the_model_is_loaded_leaves_nothing_either(tmp_path, capsys):
    place = furnish(tmp_path)
    with unchanged(place):
        argv = command_line(place, "prune")
        assert "removes none" in refused(capsys, *argv, "--pattern", "neurons", "--sparsity", "0.001")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_nothing_is_measured_or_learned_of_weights_that_are_no_numbers(tmp_path, capsys, name, value):
    place = furnish(tmp_path)
    path = place / "teacher" / "model.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[3] = value
    save_file(weights, path, {"format": "pt"})
    for command in ("prune", "evaluate", "levels", "ablation", "distill"):
        argv = command_line(place, command)
        if command == "distill":
            argv[-2:-2] = ["--mask_schedule", "oneshot"]
        else:
            argv[1] = str(place / "teacher")
        with unchanged(place):
            said = refused(capsys, *argv)
        assert name in said and "NaN or infinity" in said, command


def test_a_generation_config_that_could_not_be_saved_is_said_before_training(tmp_path, capsys):
    place = furnish(tmp_path)
    (place / "model" / "generation_config.json").write_text('{"temperature": -5, "eos_token_id": 7}')
    with unchanged(place):
        assert "generation_config.json" in refused(capsys, *command_line(place, "sft"))


def test_a_classifiers_folder_is_no_language_model(root, tmp_path, capsys):
    classifier = LlamaForSequenceClassification.from_pretrained(root / "dense")
    classifier.save_pretrained(tmp_path / "classifier")
    load_tokenizer(str(root / "dense")).save_pretrained(tmp_path / "classifier")
    (tmp_path / "t.txt").write_text("1 plus 2 makes 3. " * 20)
    argv = ["prune", tmp_path / "classifier", "--calibration", tmp_path / "t.txt", "--output", tmp_path / "out"]
    assert "LlamaForSequenceClassification" in refused(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_another_architectures_weights(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "llama")
    tiny("gpt2").save_pretrained(tmp_path / "gpt2")
    shutil.copy(tmp_path / "gpt2" / "model.safetensors", tmp_path / "llama")
    with refusal("lack"):
        check_model_source(str(tmp_path / "llama"))


@pytest.mark.parametrize("architecture", [*DENSE, *MIXTURES])
def test_whole_models_of_every_architecture_pass(tmp_path, architecture):
    """Tied heads that no file holds, experts that are stored one by one, buffers that are left out: all by design."""
    tiny(architecture).save_pretrained(tmp_path)
    check_model_source(str(tmp_path))


def test_pickled_weights_pass_if_they_are_only_weights(root, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(root / "dense", folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    check_model_source(str(folder))


@pytest.mark.parametrize("flag, other", [("--model_name_or_path", 1), ("--teacher_model_name_or_path", -1)])
def test_training_commands_look_at_model_and_teacher_before_they_start(root, tmp_path, capsys, flag, other):
    place = furnish(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(place / "model", broken)
    changed_config(num_hidden_layers=5)(broken)
    argv = command_line(place, "distill")
    argv[argv.index(flag) + 1] = str(broken)
    with unchanged(place):
        assert "lack model.layers.2" in refused(capsys, *argv)


def test_a_tokenizer_of_another_model(tmp_path, capsys):
    place = furnish(tmp_path)
    tiny_model(place / "small", vocab_size=200)
    for command in ("prune", "evaluate", "levels", "sft", "grpo"):
        argv = [item if item != str(place / "model") else str(place / "small") for item in command_line(place, command)]
        with unchanged(place):
            assert "vocab_size" in refused(capsys, *argv)


@pytest.mark.parametrize("name, data", [
    ("tokenizer.json", b""), ("tokenizer.json", b"{"), ("tokenizer.json", b"null"),
    ("tokenizer.json", b'{"model": {}}'),
    ("tokenizer_config.json", b"null"), ("tokenizer_config.json", b"[" * 9999), ("tokenizer.json", b"\xff\x00"),
])
def test_damaged_tokenizers(root, tmp_path, name, data):
    folder = tmp_path / "model"
    shutil.copytree(root / "dense", folder)
    (folder / name).write_bytes(data)
    with refusal("tokenizer"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("source", [
    "", "x" * 5000, "a\0b", "/nowhere", "./nowhere", "~nobody/x", "a/b/c", "\ud800", "a\nb",
])
def test_names_of_models_that_are_none(source):
    with refusal("does not exist"):
        check_model_source(source)


def test_code_in_a_models_folder_runs_only_when_that_is_asked_for(root, tmp_path, capsys, monkeypatch):
    """And never because something on standard input looks like an answer to a question."""
    folder = tmp_path / "model"
    shutil.copytree(root / "dense", folder)
    changed_config(model_type="mine", auto_map={"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"})(folder)
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ValueError('ran')\n")
    (tmp_path / "t.txt").write_text("1 plus 2 makes 3. " * 20)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("somebody was asked"))
    commands = [
        ["evaluate", folder, "--text", tmp_path / "t.txt"],
        ["prune", folder, "--calibration", tmp_path / "t.txt", "--output", tmp_path / "out"],
        ["sft", "--model_name_or_path", folder, "--dataset_name", tmp_path / "t.txt", "--output_dir", tmp_path / "out",
         "--use_cpu", "true"],
    ]
    for argv in commands:
        assert "--trust_remote_code" in refused(capsys, *argv)
    assert not (tmp_path / "ran").exists()
    refused(capsys, *commands[0], "--trust_remote_code")
    assert (tmp_path / "ran").exists()
