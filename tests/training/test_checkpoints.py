"""A checkpoint is whole, or it is passed over, or refused by name: never half a resume."""

import json
import shutil
import struct

import pytest

from mama_trl import MamaConfig, MamaError
from mama_trl.training.checkpoints import choose, cut_off, fault, newest_whole, remove_ours
from tests.conftest import tiny
from tests.faults import tree
from tests.training import saved
from tests.training.runs import SAVING, train, trainer_of


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer, text):
    """A run of six steps with checkpoints after 2, 4 and 6, the mask at 3, and inputs in the first checkpoint."""
    from mama_trl.evaluation.text import blocks

    folder = tmp_path_factory.mktemp("made")
    train(tiny("llama"), blocks(tokenizer, text, 32), folder, save=True, **SAVING)
    return folder


@pytest.fixture
def run(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def files_of(checkpoint):
    return sorted(json.loads((checkpoint / "mama" / "state.json").read_text())["files"])


def damage(path, how):
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "longer":
        path.write_bytes(data + b"\0")
    else:  # one bit somewhere in the middle
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])


def test_state_json_lists_all_that_resuming_reads(run):
    assert {name.rpartition("/")[2] for name in files_of(run / "checkpoint-4")} >= {
        "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "config.json",
        "masks.safetensors", "statistics.safetensors",
    }
    assert "mama/inputs.safetensors" in files_of(run / "checkpoint-2")
    assert all(fault(run / f"checkpoint-{step}") is None for step in (2, 4, 6))


@pytest.mark.parametrize("how", ["missing", "empty", "cut", "longer", "flipped"])
def test_whatever_is_damaged_is_named_and_the_one_before_is_taken(run, how, caplog):
    for name in [*files_of(run / "checkpoint-6"), "mama/state.json"]:
        keep = (run / "checkpoint-6" / name).read_bytes()
        damage(run / "checkpoint-6" / name, how)
        assert name.rpartition("/")[2] in fault(run / "checkpoint-6"), (name, how)
        assert newest_whole(run).name == "checkpoint-4"
        caplog.clear()
        assert choose(run, True).endswith("checkpoint-4")
        assert "checkpoint-6 is not whole" in caplog.text and name.rpartition("/")[2] in caplog.text
        with pytest.raises(MamaError, match="checkpoint-6 is not whole.*resume from checkpoint-4"):
            choose(run, str(run / "checkpoint-6"))
        (run / "checkpoint-6" / name).write_bytes(keep)
    assert newest_whole(run).name == "checkpoint-6"


def test_large_files_are_hashed_by_samples(run, monkeypatch):
    from mama_trl.training import manifest

    path = run / "checkpoint-6" / "optimizer.pt"
    monkeypatch.setattr(manifest, "_WHOLE", 1000)
    monkeypatch.setattr(manifest, "_SAMPLE", 64)
    data, before = path.read_bytes(), manifest.digest(path)
    assert manifest.digest(path) == before
    for place in (0, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert manifest.digest(path) != before


@pytest.mark.parametrize("name", ["mama/masks.safetensors", "mama/statistics.safetensors", "optimizer.pt",
                                  "scheduler.pt", "rng_state.pth"])
def test_a_trainer_that_is_given_less_than_a_checkpoint_refuses(run, rows, name):
    (run / "checkpoint-4" / name).unlink()
    with pytest.raises(MamaError, match=f"checkpoint-4 is not whole.*{name}"):
        train(tiny("llama"), rows, run, resume=str(run / "checkpoint-4"), **SAVING)


def test_none_whole_is_refused_by_name_but_a_stump_starts_anew(run, caplog):
    """A damaged checkpoint may be mended; of a save that was cut off there is nothing to mend."""
    for step in (2, 4, 6):
        (run / f"checkpoint-{step}" / "model.safetensors").unlink()
    with pytest.raises(MamaError, match="checkpoint-6 is not whole.*no other checkpoint is.*overwrite"):
        choose(run, True)
    for step in (2, 4, 6):
        (run / f"checkpoint-{step}" / "mama" / "state.json").unlink()
    assert choose(run, True) is None
    assert "starting from the beginning" in caplog.text and "checkpoint-2 is not whole" in caplog.text
    assert "start from the beginning" in cut_off(run)


def test_checkpoints_of_others_are_not_resumed(run, rows, tmp_path):
    from transformers import Trainer

    from tests.training.runs import arguments, dataset

    other = Trainer(tiny("llama"), args=arguments(tmp_path / "plain", **SAVING), train_dataset=dataset(rows))
    other.train()
    assert "without MamaCallback" in fault(tmp_path / "plain" / "checkpoint-6")
    with pytest.raises(MamaError, match="checkpoint-6 was written without MamaCallback"):
        choose(tmp_path / "plain", True)
    assert choose(tmp_path / "nothing", True) is None and choose(run, None) is None
    with pytest.raises(MamaError, match="is no folder"):
        choose(run, str(run / "checkpoint-99"))


def test_a_checkpoint_without_its_optimizer_is_not_resumed(rows, tmp_path):
    train(tiny("llama"), rows, tmp_path, save_only_model=True, **SAVING)
    with pytest.raises(MamaError, match="saved without its optimizer.*save_only_model"):
        choose(tmp_path, str(tmp_path / "checkpoint-6"))


def test_a_stump_takes_no_whole_checkpoints_place(rows, tmp_path):
    """Killed while it saved step 6, and resumed with something else that saves too: of two checkpoints to keep one is
    whole at every moment."""
    from transformers import TrainerCallback

    class Look(TrainerCallback):
        seen = []

        def on_step_end(self, args, state, control, **kwargs):
            self.seen.append(newest_whole(tmp_path))
            control.should_save = True

        def on_save(self, args, state, control, **kwargs):  # before MamaCallback has written its part
            self.seen.append(newest_whole(tmp_path))

    limit = {"save_total_limit": 2}
    train(tiny("llama"), rows, tmp_path, **SAVING, **limit)
    (tmp_path / "checkpoint-6" / "mama" / "state.json").unlink()
    look = Look()
    trainer, _ = trainer_of(tiny("llama"), rows, tmp_path, **SAVING, **limit)
    trainer.callback_handler.callbacks.insert(0, look)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(look.seen) == 4 and None not in look.seen
    assert newest_whole(tmp_path).name == "checkpoint-6"


def test_an_overwritten_run_leaves_the_files_of_others(run, tmp_path, caplog):
    (run / "checkpoint-4" / "notes.txt").write_text("mine")
    (run / "checkpoint-4" / "mama" / "notes.txt").write_text("mine")
    for engine, name in (("global_step4", "zero_pp_rank_0_optim_states.pt"), ("optimizer_0", "__0_0.distcp")):
        (run / "checkpoint-4" / engine).mkdir()
        (run / "checkpoint-4" / engine / name).write_bytes(b"ours")
    (run / "checkpoint-8").mkdir()
    (run / "checkpoint-8" / "model.safetensors").write_bytes(b"somebody's")
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(run / "checkpoint-2", tmp_path / "elsewhere" / "checkpoint-10")
    (run / "checkpoint-10").symlink_to(tmp_path / "elsewhere" / "checkpoint-10")
    before = saved.raw_tensors(run)
    remove_ours(run)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-4", "checkpoint-8"]
    assert sorted(tree(run / "checkpoint-4")) == ["mama", "mama/notes.txt", "notes.txt"]
    assert fault(tmp_path / "elsewhere" / "checkpoint-10") is None
    assert saved.raw_tensors(run).keys() == before.keys()
    assert "checkpoint-8 stays" in caplog.text and "checkpoint-4 keeps" in caplog.text


def test_what_an_earlier_model_left_goes_with_its_weights(rows, tmp_path):
    """A dense model that is saved over a pruned one has no masks beside it."""
    _, mama = train(tiny("llama"), rows, tmp_path, save=True)
    assert (tmp_path / "mama" / "masks.safetensors").exists()
    trainer, _ = train(tiny("llama", seed=1), rows, tmp_path, MamaConfig(sparsity=0.0), save=True)
    assert not (tmp_path / "mama" / "masks.safetensors").exists()
    assert (tmp_path / "mama" / "statistics.safetensors").exists()
    assert saved.sparsity(tmp_path) < 0.01


def test_counting_is_by_hand():
    """The counter of these tests on bytes written by hand: 0.0, -0.0, 1.0 and NaN."""
    import tempfile
    from pathlib import Path

    folder = Path(tempfile.mkdtemp())
    header = {"model.layers.0.q.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    text = json.dumps(header).encode()
    body = struct.pack("<ffff", 0.0, -0.0, 1.0, float("nan"))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    assert saved.zeros(folder) == (2, 4) and saved.not_finite(folder) == 1
