"""What a resumed run is, and what it is not: another run, one step more, or a run whose mask never comes."""

import json
import shutil

import pytest
import torch
from transformers import TrainerCallback

from mama_trl import MamaConfig, MamaError, MaskSet
from tests.conftest import tiny
from tests.training import saved
from tests.training.runs import SAVING, train, trainer_of

CONFIG = MamaConfig(sparsity=0.75, mask_start=3)


class StopAt(TrainerCallback):
    """Ends a run as a kill would: between two steps."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def stopped(model, rows, folder, step, config=CONFIG, **changes):
    with pytest.raises(KeyboardInterrupt):
        train(model, rows, folder, config, callbacks=[StopAt(step)], **{**SAVING, **changes})


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tokenizer, text):
    """A run that was killed after five steps, with checkpoints after two and four."""
    from mama_trl.evaluation.text import blocks

    folder = tmp_path_factory.mktemp("begun")
    stopped(tiny("llama"), blocks(tokenizer, text, 32), folder, 5)
    return folder


@pytest.fixture
def again(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


# ---------------------------------------------------------------------- which run


@pytest.mark.parametrize("changes,config,word", [
    ({"learning_rate": 1e-3}, CONFIG, "`learning_rate` is 0.01 there and 0.001 here"),
    ({"seed": 3}, CONFIG, "`seed` is 0 there and 3 here"),
    ({"weight_decay": 0.1}, CONFIG, "`weight_decay`"),
    ({"lr_scheduler_type": "cosine"}, CONFIG, "`lr_scheduler_type` is 'linear' there and 'cosine' here"),
    ({}, MamaConfig(sparsity=0.5, mask_start=3), "`sparsity` is 0.75 there and 0.5 here"),
    ({}, MamaConfig(sparsity=0.75, mask_start=3, redistribution="none"), "`redistribution`"),
])
def test_a_run_of_other_settings_is_not_gone_on_with(rows, again, changes, config, word):
    with pytest.raises(MamaError) as told:
        train(tiny("llama"), rows, again, config, resume=True, **{**SAVING, **changes})
    assert "checkpoint-4 belongs to another run" in str(told.value) and word in str(told.value)


def test_other_data_is_another_run(rows, again):
    for data in (rows.flip(0), rows[:-4]):
        with pytest.raises(MamaError, match="belongs to another run.*the training data"):
            train(tiny("llama"), data, again, CONFIG, resume=True, **SAVING)


def test_what_may_change_on_resume_does(rows, again):
    changes = {
        "max_steps": 8, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "save_steps": 3,
        "logging_steps": 2, "save_strategy": "steps", "dataloader_num_workers": 0, "run_name": "other",
    }
    config = MamaConfig(sparsity=0.75, mask_start=4)
    trainer, mama = train(tiny("llama"), rows, again, config, resume=True, save=True, **changes)
    assert trainer.state.global_step == 8
    assert saved.sparsity(again) == pytest.approx(0.75, abs=1e-3)


def test_the_fingerprint_holds_no_secrets(rows, tmp_path):
    train(tiny("llama"), rows, tmp_path, CONFIG, hub_token="hf_secret", **SAVING)
    state = (tmp_path / "checkpoint-6" / "mama" / "state.json").read_text()
    assert "hf_secret" not in state
    known = json.loads(state)["identity"]
    assert known["settings"]["learning_rate"] == 0.01 and known["data"].startswith(f"{len(rows)} rows")


# ---------------------------------------------------------------------- a finished run


@pytest.mark.parametrize("batch,schedule", [
    (4, {}),
    pytest.param(64, {}, marks=pytest.mark.slow),
    pytest.param(4, {"save_strategy": "epoch", "eval_strategy": "epoch"}, marks=pytest.mark.slow),
    (64, {"save_strategy": "epoch", "eval_strategy": "epoch"}),
], ids=["within an epoch", "several epochs", "saved by epoch", "several epochs, saved by epoch"])
def test_a_finished_run_that_is_resumed_is_left_as_it_is(rows, tmp_path, caplog, batch, schedule):
    changes = {**SAVING, **schedule, "per_device_train_batch_size": batch, "lr_scheduler_type": "constant"}
    first, _ = train(tiny("llama"), rows, tmp_path, CONFIG, save=True, **changes)
    weights = saved.raw_tensors(tmp_path)
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    before = {path.name: path.stat().st_mtime_ns for path in last.rglob("*")}
    names = {path.name for path in tmp_path.iterdir()}
    for _ in range(2):
        caplog.clear()
        again, mama = train(tiny("llama", seed=5), rows, tmp_path, CONFIG, resume=True, save=True, **changes)
        assert again.state.global_step == 6 and "the run is finished: step 6 of 6" in caplog.text
        assert {name: (a, b, c.tolist()) for name, (a, b, c) in saved.raw_tensors(tmp_path).items()} == {
            name: (a, b, c.tolist()) for name, (a, b, c) in weights.items()
        }
        assert {path.name: path.stat().st_mtime_ns for path in last.rglob("*")} == before
        assert {path.name for path in tmp_path.iterdir()} == names
        assert mama.masks.verify(again.model) == 0 and "train_loss" in again.state.log_history[-1]
        assert again.state.log_history[-1]["train_loss"] == 0.0
        assert again.state.epoch == first.state.epoch
    # The optimizer of a later training moves weights again.
    longer, _ = train(tiny("llama"), rows, tmp_path, CONFIG, resume=True, save=True, **{**changes, "max_steps": 7})
    assert longer.state.global_step == 7
    for name, (_, _, bits) in saved.raw_tensors(tmp_path).items():
        assert not (bits == weights[name][2]).all(), name


def test_a_trainer_trains_on_after_a_finished_run(rows, tmp_path):
    train(tiny("llama"), rows, tmp_path, CONFIG, **SAVING)
    trainer, mama = trainer_of(tiny("llama"), rows, tmp_path, CONFIG, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    held = [value.clone() for value in trainer.model.parameters()]
    mama.config = MamaConfig(mask_schedule="hold")
    trainer.train()
    assert not any(torch.equal(one, other) for one, other in zip(held, trainer.model.parameters()))


# ---------------------------------------------------------------------- a mask that is overdue


@pytest.mark.parametrize("config", [
    MamaConfig(sparsity=0.75, mask_start=0.5),
    MamaConfig(sparsity=0.75, mask_schedule="cubic", mask_start=0.25, mask_end=0.75, mask_interval=2),
], ids=["oneshot", "cubic"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_mask_whose_step_was_passed_over_is_made_at_the_next(rows, tmp_path, config, calibrated):
    """Sixteen steps of one batch; resumed after the seventh with four batches a step, half of the steps are enough."""
    if not calibrated:
        config.indicators, config.redistribution = ["magnitude"], "none"
    epoch = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 4}
    rows = rows[:64]
    stopped(tiny("llama"), rows, tmp_path, 3, config, gradient_accumulation_steps=1, save_steps=3 - 1, **epoch)
    trainer, mama = train(
        tiny("llama"), rows, tmp_path, config, resume=True, save=True, gradient_accumulation_steps=4, **epoch
    )
    assert trainer.state.max_steps == 4 and trainer.state.global_step == 4
    assert saved.sparsity(tmp_path) == pytest.approx(0.75, abs=1e-3)
    assert mama.missed is None


def test_a_mask_that_is_overdue_at_the_very_end_is_made_in_the_step_that_is_left(rows, tmp_path):
    """Resumed where the run should have ended, in the middle of an epoch: the Trainer has one step more."""
    config = MamaConfig(sparsity=0.75, mask_start=0.9)
    stopped(tiny("llama"), rows, tmp_path, 5, config, max_steps=8)
    trainer, mama = train(tiny("llama"), rows, tmp_path, config, resume=True, save=True, max_steps=4)
    assert saved.sparsity(tmp_path) == pytest.approx(0.75, abs=1e-3) and mama.missed is None


def test_one_mask_is_made_once(rows, tmp_path):
    """A run that is made longer does not compute its one mask a second time."""
    config = MamaConfig(sparsity=0.75, mask_start=0.5)
    train(tiny("llama"), rows, tmp_path, config, **SAVING)
    masks = MaskSet.load(tmp_path / "checkpoint-6").digest()
    _, mama = train(tiny("llama"), rows, tmp_path, config, resume=True, **{**SAVING, "max_steps": 20})
    assert mama.masks.digest() == masks


# ---------------------------------------------------------------------- a run that ends below its sparsity


class StopEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 3


@pytest.mark.parametrize("config,reached", [
    (MamaConfig(sparsity=0.75, mask_start=5), 0.0),
    (MamaConfig(sparsity=0.75, mask_schedule="cubic", mask_start=1, mask_end=5, mask_interval=1), None),
])
def test_a_run_that_ends_below_its_sparsity_says_so(rows, tmp_path, caplog, config, reached):
    trainer, mama = train(tiny("llama"), rows, tmp_path, config, callbacks=[StopEarly()], save=True)
    found = saved.sparsity(tmp_path)
    assert found == pytest.approx(reached, abs=1e-3) if reached is not None else 0 < found < 0.74
    assert mama.missed in caplog.text and f"ends at sparsity {found:.4f} instead of 0.7500" in mama.missed
    row = next(row for row in reversed(trainer.state.log_history) if "mama/sparsity_missed" in row)
    assert row["mama/sparsity_missed"] == pytest.approx(0.75 - found, abs=1e-6)
    mama.on_push_begin(trainer.args, trainer.state, trainer.control)
    assert "Not as sparse as asked for" in (tmp_path / "mama" / "README.md").read_text()


def test_a_run_that_comes_to_its_sparsity_says_nothing(rows, tmp_path, caplog):
    trainer, mama = train(tiny("llama"), rows, tmp_path, CONFIG)
    assert mama.missed is None and not any("mama/sparsity_missed" in row for row in trainer.state.log_history)
    assert "ends at sparsity" not in caplog.text


def test_zeros_that_die_are_counted(rows, tmp_path):
    """Something brings weights back behind the last step: the number is the weights', not the masks'."""

    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                with torch.no_grad():
                    model.model.layers[0].mlp.up_proj.weight.fill_(0.1)

    class Counts(TrainerCallback):
        seen = {}

        def on_step_begin(self, args, state, control, **kwargs):
            mama.run.count()
            self.seen[state.global_step] = mama.sparsity

    counts = Counts()
    trainer, mama = trainer_of(tiny("llama"), rows, tmp_path, CONFIG, callbacks=[Spoil(), counts])
    trainer.train()
    assert counts.seen[5] < counts.seen[4] == pytest.approx(0.75, abs=1e-3)
    assert mama.masks.sparsity() == pytest.approx(0.75, abs=1e-3)
