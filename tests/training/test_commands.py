"""`mama` training commands: what overwriting removes, what resuming takes, and exit codes that tell."""

import json
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from mama_trl.cli import main
from mama_trl.training.checkpoints import newest_whole
from tests.scripts.conftest import TEXT, refused
from tests.tiny_tokenizer import tiny_tokenizer
from tests.training import saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("commands")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "train.txt").write_text(TEXT)
    (root / "other.txt").write_text(TEXT[::-1])
    return root


def command(folder, output, **changes) -> list[str]:
    """`mama sft`, six steps on the CPU with a checkpoint after every second; `None` leaves a flag out."""
    flags = {
        "model_name_or_path": folder / "model", "dataset_name": folder / "train.txt", "output_dir": output,
        "max_steps": 6, "save_steps": 2, "max_length": 32, "use_cpu": "true", "sparsity": 0.5, "mask_start": 3,
        "per_device_train_batch_size": 4, "calibration_tokens": 256, "logging_steps": 1, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", **changes,
    }
    return ["sft", *(str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value))]


class Kill(TrainerCallback):
    def __init__(self, step=None, end=False):
        self.step, self.end = step, end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt

    def on_train_end(self, args, state, control, **kwargs):
        if self.end:
            raise KeyboardInterrupt


def killed(monkeypatch, argv, **when) -> None:
    """Runs a command that ends as Ctrl-C would end it."""
    from mama_trl.scripts import training

    connect = training.connect

    def with_kill(trainer):
        connect(trainer)
        trainer.add_callback(Kill(**when))

    with monkeypatch.context() as patch:
        patch.setattr(training, "connect", with_kill)
        assert main(argv) == 130


def test_overwriting_removes_our_checkpoints_so_that_no_run_becomes_an_older_one(folder, tmp_path, monkeypatch, caplog):
    output = tmp_path / "run"
    assert main(command(folder, output)) == 0
    (output / "notes.txt").write_text("mine")
    again = command(folder, output, learning_rate=1e-2)
    assert "--overwrite" in refused_line(monkeypatch, again)
    killed(monkeypatch, [*again, "--overwrite", "true"], step=1)  # before its own first checkpoint
    assert not list(output.glob("checkpoint-*")) and (output / "notes.txt").read_text() == "mine"
    assert main([*again, "--resume_from_checkpoint", "true"]) == 0
    assert "starting from the beginning" in caplog.text
    assert main(command(folder, tmp_path / "fresh", learning_rate=1e-2)) == 0
    assert saved.same(output, tmp_path / "fresh")


def refused_line(monkeypatch, argv) -> str:
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        assert main(argv) == 2
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("mama: ")]
    return line


def test_a_mistake_removes_nothing(folder, tmp_path, capsys):
    """Settings, data and model are looked at before the old run is given up."""
    output = tmp_path / "run"
    assert main(command(folder, output)) == 0
    names = sorted(path.name for path in output.iterdir())
    for changes in ({"sparsity": 1.5}, {"dataset_name": folder / "none.txt"}, {"model_name_or_path": folder},
                    {"mask_schedule": "hold", "mask_start": None}, {"target_modules": "nothing_like_this"}):
        refused(capsys, *command(folder, output, **changes), "--overwrite", "true")
        assert sorted(path.name for path in output.iterdir()) == names
    assert newest_whole(output).name == "checkpoint-6"


def test_another_runs_checkpoints_are_refused_not_resumed(folder, tmp_path, capsys):
    """As after a kill of a run in the same folder that had not come to its first checkpoint."""
    output = tmp_path / "run"
    assert main(command(folder, output)) == 0
    again = ["--resume_from_checkpoint", "true"]
    for changes, word in (({"learning_rate": 1e-2}, "learning_rate"), ({"sparsity": 0.7}, "sparsity"),
                          ({"dataset_name": folder / "other.txt"}, "the training data"), ({"seed": 7}, "seed")):
        line = refused(capsys, *command(folder, output, **changes), *again)
        assert "checkpoint-6 belongs to another run" in line and word in line


def test_a_finished_command_that_is_resumed_does_nothing_and_says_so(folder, tmp_path, caplog):
    output = tmp_path / "run"
    assert main(command(folder, output)) == 0
    before = (output / "model.safetensors").read_bytes()
    for _ in range(2):
        caplog.clear()
        assert main([*command(folder, output), "--resume_from_checkpoint", "true"]) == 0
        assert "the run is finished" in caplog.text
        assert (output / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize("when", [{"end": True}, {"step": 5}])
def test_a_command_killed_at_the_very_end_goes_on(folder, tmp_path, monkeypatch, when):
    output = tmp_path / "run"
    killed(monkeypatch, command(folder, output), **when)
    assert not (output / "model.safetensors").exists()
    assert main([*command(folder, output), "--resume_from_checkpoint", "true"]) == 0
    assert main(command(folder, tmp_path / "whole")) == 0
    assert saved.same(output, tmp_path / "whole") and saved.sparsity(output) == pytest.approx(0.5, abs=0.01)


def test_a_stump_of_the_first_checkpoint_starts_anew(folder, tmp_path, monkeypatch, caplog):
    output = tmp_path / "run"
    killed(monkeypatch, command(folder, output), step=3)
    for name in ("optimizer.pt", "trainer_state.json", "mama/state.json"):  # the order in which they are written
        (output / "checkpoint-2" / name).unlink()
    with open(output / "checkpoint-2" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    assert main([*command(folder, output), "--resume_from_checkpoint", "true"]) == 0
    assert "checkpoint-2 is not whole" in caplog.text and "starting from the beginning" in caplog.text
    assert main(command(folder, tmp_path / "whole")) == 0
    assert saved.same(output, tmp_path / "whole")


def test_a_full_disk_in_the_first_checkpoint_is_no_end(folder, tmp_path, monkeypatch, caplog):
    output, save = tmp_path / "run", torch.save

    def full(value, path, *args, **kwargs):
        if "checkpoint-2" in str(path) and "optimizer" in str(path):
            with open(path, "wb") as file:
                file.write(b"PK")
            raise OSError(28, "No space left on device")
        save(value, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        try:
            assert main(command(folder, output)) != 0
        except OSError:
            pass
    assert main([*command(folder, output), "--resume_from_checkpoint", "true"]) == 0
    assert "checkpoint-2 is not whole" in caplog.text and "starting from the beginning" in caplog.text
    assert main(command(folder, tmp_path / "whole")) == 0
    assert saved.same(output, tmp_path / "whole")


def test_a_cut_file_in_the_newest_checkpoint_is_passed_over(folder, tmp_path, caplog, capsys):
    output = tmp_path / "run"
    assert main(command(folder, output)) == 0
    whole = (output / "model.safetensors").read_bytes()
    shutil.rmtree(output / "checkpoint-6" / "mama")
    with open(output / "checkpoint-4" / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    (output / "model.safetensors").unlink()
    assert main([*command(folder, output), "--resume_from_checkpoint", "true"]) == 0
    assert "checkpoint-6 is not whole" in caplog.text and "checkpoint-4 is not whole" in caplog.text
    assert (output / "model.safetensors").read_bytes() == whole
    named = str(output / "checkpoint-4")
    with open(output / "checkpoint-4" / "model.safetensors", "r+b") as file:
        file.truncate(999)
    line = refused(capsys, *command(folder, output), "--resume_from_checkpoint", named)
    assert "checkpoint-4 is not whole (model.safetensors has 999 bytes" in line


def test_a_command_whose_weights_become_nan_exits_with_2(folder, tmp_path, monkeypatch, capsys):
    from mama_trl.scripts import training

    class Spoil(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                model.model.norm.weight.grad[0] = float("nan")

    connect = training.connect
    monkeypatch.setattr(training, "connect", lambda trainer: (connect(trainer), trainer.add_callback(Spoil())))
    line = refused(capsys, *command(folder, tmp_path / "run"))
    assert "holds NaN or infinity after step 5" in line and "resume from checkpoint-4" in line
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert saved.not_finite(tmp_path / "run" / "checkpoint-4") == 0


def test_a_command_that_ends_below_its_sparsity_exits_with_2_and_saves(folder, tmp_path, monkeypatch, capsys):
    from mama_trl.scripts import training

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 2

    connect = training.connect
    monkeypatch.setattr(training, "connect", lambda trainer: (connect(trainer), trainer.add_callback(Stop())))
    line = refused(capsys, *command(folder, tmp_path / "run"))
    assert "ends at sparsity 0.0000 instead of 0.5000 (no mask was computed)" in line
    assert saved.sparsity(tmp_path / "run") == 0.0


def test_resumed_with_fewer_steps_the_mask_comes_all_the_same(folder, tmp_path, monkeypatch):
    output = tmp_path / "run"
    epoch = {"max_steps": None, "num_train_epochs": 1, "mask_start": 0.5, "save_steps": 4}
    killed(monkeypatch, command(folder, output, **epoch), step=5)
    more = command(folder, output, **epoch, gradient_accumulation_steps=4)
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    assert main([*more, "--resume_from_checkpoint", "true"]) == 0
    assert saved.sparsity(output) == pytest.approx(0.5, abs=0.01)
    assert json.loads((output / "mama" / "state.json").read_text())["step"] < state["max_steps"] / 2


def test_prune_refuses_to_bring_weights_back(folder, tmp_path, capsys):
    half = ["prune", folder / "model", "--method", "magnitude", "--sparsity", "0.5", "--output", tmp_path / "half"]
    assert main([str(word) for word in half]) == 0
    out = capsys.readouterr().out
    assert f"{saved.sparsity(tmp_path / 'half'):.2%} of the prunable weights are zero" in out
    less = ["prune", tmp_path / "half", "--calibration", folder / "train.txt", "--sparsity", "0.3",
            "--output", tmp_path / "less"]
    assert "`sparsity` is 0.3, but 0.5" in refused(capsys, *less)
    assert not (tmp_path / "less" / "model.safetensors").exists()
