"""Kill, resume and inheritance: what a run saves is what the next one finds."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from mama_trl import MamaConfig, MamaError, MaskSet

from ..helpers import train


@pytest.mark.parametrize("schedule", ["oneshot", "cubic"])
def test_killed_and_resumed_gives_the_same_masks_and_weights(make_model, rows, tmp_path, schedule):
    ramp = {"mask_end": 7, "mask_interval": 3} if schedule == "cubic" else {}
    config = MamaConfig(sparsity=0.8, mask_schedule=schedule, mask_start=4, **ramp)
    changes = {"save_strategy": "steps", "save_steps": 3}
    whole, masks, _ = train(make_model("llama"), rows, tmp_path / "a", config, **changes)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(make_model("llama"), rows, tmp_path / "b", config, callbacks=[Kill()], **changes)
    resumed, again, check = train(make_model("llama", seed=9), rows, tmp_path / "b", config, resume=True, **changes)
    assert again.masks.digest() == masks.masks.digest() and check.violations == 0
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(a, b), name
    for name, value in masks.trajectory.values["sensitivity"].items():
        assert torch.equal(value, again.trajectory.values["sensitivity"][name]), name


def test_resuming_from_elsewhere(make_model, rows, tmp_path):
    """The Trainer tells nobody which checkpoint it was given: another run's masks must never be taken for its own."""
    config = MamaConfig(sparsity=0.5, mask_start=1)
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    train(make_model("llama"), rows, tmp_path / "a", config, **saving)
    train(make_model("llama", seed=3), rows, tmp_path / "b", config, **saving)
    source = str(tmp_path / "a" / "checkpoint-2")
    with pytest.raises(MamaError, match="at step 2 is not .*checkpoint-2.*set `resume_from_checkpoint`"):
        train(make_model("llama"), rows, tmp_path / "b", config, resume=source, max_steps=3)
    _, mama, check = train(
        make_model("llama"), rows, tmp_path / "b", config, resume=source, resume_from_checkpoint=source, max_steps=3
    )
    assert mama.masks.digest() == MaskSet.load(source).digest() and check.violations == 0


def test_resume_without_masks_is_refused(make_model, rows, tmp_path):
    config = MamaConfig(mask_start=2)
    train(make_model("llama"), rows, tmp_path, config, save_strategy="steps", save_steps=4)
    shutil.rmtree(tmp_path / "checkpoint-8" / "mama")
    with pytest.raises(MamaError, match="checkpoint-8 is not whole.*resume from .*checkpoint-4"):
        train(make_model("llama"), rows, tmp_path, config, resume=True, max_steps=10)


def test_the_next_stage_takes_up_masks_and_statistics(make_model, rows, tmp_path):
    trainer, first, _ = train(make_model("llama"), rows, tmp_path / "a", MamaConfig(sparsity=0.8, mask_start=2))
    trainer.save_model(str(tmp_path / "a"))
    load = type(trainer.model).from_pretrained
    _, second, check = train(
        load(tmp_path / "a"), rows, tmp_path / "b", MamaConfig(sparsity=0.8, mask_schedule="hold")
    )
    assert second.masks.digest() == first.masks.digest() and check.steps == 8 and check.violations == 0
    assert int(second.trajectory.counts["sensitivity"]) == 16
    assert [record["step"] for record in second.trajectory.history].count(0) == 2

    config = MamaConfig(sparsity=0.0, inherit_masks=False)
    _, third, _ = train(load(tmp_path / "a"), rows, tmp_path / "c", config)
    assert third.masks is None and int(third.trajectory.counts["sensitivity"]) == 8


def test_a_save_limit_of_one_is_refused(make_model, rows, tmp_path):
    with pytest.raises(MamaError, match="`save_total_limit` is 1.*set it to 2"):
        train(make_model("llama"), rows, tmp_path, MamaConfig(), save_strategy="steps", save_total_limit=1)
KILLED_SAVE = """
import os, sys
from pathlib import Path
import torch
from transformers import TrainerCallback
sys.path.insert(0, {root!r})
from mama_trl import MamaConfig
from mama_trl.disk import writing
from tests.conftest import tiny
from tests.helpers import train

write, saves = writing.write_atomically, [0]

def dying(path, work):
    if "checkpoint-4" in str(path):
        saves[0] += 1
        if saves[0] == {when}:
            if {half}:
                path.parent.mkdir(exist_ok=True)
                work(path.with_name("half"))
            os.kill(os.getpid(), 9)
    write(path, work)

for name in ("masks.tensors", "disk.writing"):
    setattr(sys.modules["mama_trl." + name], "write_atomically", dying)
rows = torch.randint(2, 384, (64, 24), generator=torch.Generator().manual_seed(0))
train(tiny("llama"), rows, {folder!r}, MamaConfig(sparsity=0.8, mask_start=5), save_strategy="steps", save_steps=2,
      save_total_limit=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("when,half", [(1, False), (1, True), (2, True), (3, False)])
def test_kill_9_while_saving_leaves_a_whole_checkpoint(make_model, tmp_path, caplog, when, half):
    """Killed at the first, second and last of our files, before and while it is written."""
    import subprocess
    import sys

    from mama_trl.training.checkpoints import cut_off, newest_whole

    root = str(Path(__file__).resolve().parents[2])
    code = KILLED_SAVE.format(root=root, when=when, half=half, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.returncode == -9, done.stderr[-2000:]
    assert newest_whole(tmp_path).name == "checkpoint-2"
    assert "checkpoint-4 is not whole" in cut_off(tmp_path) and "checkpoint-2" in cut_off(tmp_path)
    rows = torch.randint(2, 384, (64, 24), generator=torch.Generator().manual_seed(0))
    config = MamaConfig(sparsity=0.8, mask_start=5)
    changes = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    with pytest.raises(MamaError, match="checkpoint-4 is not whole.*resume from .*checkpoint-2"):
        train(make_model("llama"), rows, tmp_path, config, resume=str(tmp_path / "checkpoint-4"), **changes)
    resumed, again, _ = train(
        make_model("llama", seed=9), rows, tmp_path, config, resume=str(newest_whole(tmp_path)), **changes
    )
    whole, masks, _ = train(make_model("llama"), rows, tmp_path / "whole", config, **changes)
    assert again.masks.digest() == masks.masks.digest()
    for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()):
        assert torch.equal(a, b)


def test_hold_without_masks_is_refused(make_model, rows, tmp_path):
    with pytest.raises(MamaError, match="no masks lie beside"):
        train(make_model("llama"), rows, tmp_path, MamaConfig(mask_schedule="hold"))


def test_masks_of_another_model_are_refused(make_model, rows, tmp_path):
    trainer, mama, _ = train(make_model("llama"), rows, tmp_path / "a", MamaConfig(mask_start=2))
    model = make_model("gpt2")
    model.save_pretrained(tmp_path / "gpt2")
    mama.masks.save(tmp_path / "gpt2")
    with pytest.raises(MamaError, match="belongs to another model"):
        train(type(model).from_pretrained(tmp_path / "gpt2"), rows, tmp_path / "b", MamaConfig())


def test_best_model_is_never_below_the_target(make_model, rows, tmp_path):
    """Pruning makes the loss worse, so the best loss of all is that of a dense checkpoint."""
    trainer, mama, _ = train(
        make_model("llama"), rows, tmp_path, MamaConfig(sparsity=0.9, mask_start=6),
        callbacks=[EarlyStoppingCallback(1)], load_best_model_at_end=True, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, metric_for_best_model="loss",
    )
    assert trainer.state.global_step == 8
    assert trainer.state.best_model_checkpoint.endswith(("checkpoint-6", "checkpoint-8"))
    assert mama.masks.verify(trainer.model) == 0
