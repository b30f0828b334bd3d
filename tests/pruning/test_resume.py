"""`mama prune`, killed and called again, gives bit for bit what an uninterrupted call gives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mama_trl.cli import main
from mama_trl.errors import MamaError
from mama_trl.pruning.prune import prune
from mama_trl.pruning.resume import FOLDER, KeptProgress, Unfinished

from ..tiny_tokenizer import tiny_tokenizer

TEXT = "\n\n".join(f"{a} plus {b} makes {a + b}, and {b} plus {a} too." for a in range(16) for b in range(16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "attention_bias": True, "num_hidden_layers": 6,
    }
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(root / "llama")
    del shape["attention_bias"]
    MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4)).save_pretrained(root / "mixtral")
    for name in ("llama", "mixtral"):
        tokenizer.save_pretrained(root / name)
    (root / "train.txt").write_text(TEXT)
    return root


def arguments(folder: Path, model: str, output: Path, *more) -> list[str]:
    text = str(folder / "train.txt")
    return ["prune", str(folder / model), "--calibration", text, "--output", str(output), "--sparsity", "0.7",
            "--calibration_tokens", "2048", *more]


def kill_after(blocks: int, argv: list[str], output: Path) -> None:
    """Starts `mama argv` and kills it (SIGKILL) as soon as `blocks` blocks are stored."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "mama_trl.cli", *argv], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.time() + 60
    while len(list((output / FOLDER).glob("block-*.safetensors"))) < blocks:
        assert process.poll() is None, process.stdout.read().decode()
        assert time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("model", ["llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_killed_and_called_again_is_bit_identical(folder, tmp_path, capsys, model):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(arguments(folder, model, whole)) == 0
    assert not (whole / FOLDER).exists()
    kill_after(2, arguments(folder, model, killed), killed)
    stored = len(list((killed / FOLDER).glob("block-*.safetensors")))
    assert 2 <= stored < 6 and not (killed / "config.json").exists()
    capsys.readouterr()
    assert main(arguments(folder, model, killed)) == 0
    assert f"going on after {stored} finished blocks" in capsys.readouterr().out
    assert not (killed / FOLDER).exists()
    for name in ("model.safetensors", "mama/masks.safetensors"):
        one, other = load_file(whole / name), load_file(killed / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


def interrupted(folder: Path, output: Path) -> None:
    """Leaves what a killed command leaves: its description and one finished block, without a process."""
    class Killed(Exception):
        pass

    store = Unfinished.store

    def once(self, *args):
        store(self, *args)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Unfinished, "store", once)
        with pytest.raises(Killed):
            main(arguments(folder, "llama", output))


def test_another_commands_state_is_refused_or_overwritten(folder, tmp_path, capsys):
    output = tmp_path / "out"
    interrupted(folder, output)
    before = json.loads((output / FOLDER / "command.json").read_text())
    other = arguments(folder, "llama", output, "--seed", "1")
    assert main(other) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "unfinished work of another command (seed: 0, not 1)" in said and "--overwrite" in said
    assert json.loads((output / FOLDER / "command.json").read_text()) == before
    assert main([*other, "--overwrite"]) == 0 and not (output / FOLDER).exists()
    fresh = tmp_path / "fresh"
    assert main(arguments(folder, "llama", fresh, "--seed", "1")) == 0
    one, other = load_file(fresh / "model.safetensors"), load_file(output / "model.safetensors")
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_changed_model_or_text_is_refused(folder, tmp_path, capsys, monkeypatch):
    output = tmp_path / "out"
    interrupted(folder, output)
    text = (folder / "train.txt").read_text()
    (folder / "train.txt").write_text(text[300:])
    try:
        assert main(arguments(folder, "llama", output)) == 2
        assert "model and calibration tokens: other ones" in capsys.readouterr().err
    finally:
        (folder / "train.txt").write_text(text)
    assert main(arguments(folder, "llama", output)) == 0


def test_a_full_folder_is_still_refused(folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(arguments(folder, "llama", tmp_path)) == 2
    assert "already holds something" in capsys.readouterr().err


def test_blocks_without_a_command_are_not_used(tmp_path):
    state = tmp_path / FOLDER
    state.mkdir()
    (state / "block-00000.safetensors").write_bytes(b"half a file")
    assert Unfinished(tmp_path, {"seed": 0}).blocks == 0


def test_library_call_goes_on_too(make_model, rows, tmp_path):
    whole = make_model("gpt2")
    prune(whole, rows[:16], "mama", 0.6, progress=False)

    class Killed(Exception):
        pass

    class Dying(Unfinished):
        def store(self, *args):
            super().store(*args)
            raise Killed

    again = make_model("gpt2")
    state = Dying(tmp_path, {"sparsity": 0.6})
    state.begin(again, rows[:16])
    with pytest.raises(Killed):
        prune(again, rows[:16], "mama", 0.6, progress=KeptProgress("test", state, shown=False))
    again = make_model("gpt2")
    state = Unfinished(tmp_path, {"sparsity": 0.6})
    state.begin(again, rows[:16])
    assert state.blocks == 1
    prune(again, rows[:16], "mama", 0.6, progress=KeptProgress("test", state, shown=False))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters()))
    with pytest.raises(MamaError, match="another command"):
        Unfinished(tmp_path, {"sparsity": 0.5})
