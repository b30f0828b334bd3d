"""Weights that are no numbers stop a run, before a good model or checkpoint is written over."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from mama_trl import MamaConfig, MamaError, MamaGRPOConfig, MamaGRPOTrainer, prune
from mama_trl.training.checkpoints import checkpoints, newest_whole
from mama_trl.training.grpo.rewards import RewardCheck
from tests.conftest import tiny
from tests.faults import refusal
from tests.training import saved
from tests.training.runs import SAVING, train, trainer_of


class Spoil(TrainerCallback):
    """One NaN in one gradient before the step after `step`, or in a weight; not where a mask would set it to zero."""

    def __init__(self, step, name="model.norm.weight", value=float("nan"), weight=False):
        self.step, self.name, self.value, self.weight = step, name, value, weight

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step and not self.weight:
            parameter = dict(model.named_parameters())[self.name]
            parameter.grad.view(-1)[int(parameter.view(-1).nonzero()[0])] = self.value

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step and self.weight:
            with torch.no_grad():
                dict(model.named_parameters())[self.name].view(-1)[0] = self.value


SLOW = pytest.mark.slow


@pytest.mark.parametrize("spoil", [
    pytest.param(Spoil(4), id="norm"),
    pytest.param(Spoil(4, "model.embed_tokens.weight"), id="embedding", marks=SLOW),
    pytest.param(Spoil(4, "model.layers.1.mlp.down_proj.weight"), id="target", marks=SLOW),
    pytest.param(Spoil(4, value=float("inf"), weight=True), id="infinity"),
    pytest.param(Spoil(4, "model.layers.0.self_attn.q_proj.bias", weight=True), id="bias", marks=SLOW),
])
@pytest.mark.parametrize("logging", [1, 100])
def test_a_nan_stops_the_run_and_leaves_a_finite_checkpoint(rows, tmp_path, spoil, logging):
    with pytest.raises(MamaError) as told:
        train(tiny("llama"), rows, tmp_path, callbacks=[spoil], save_total_limit=2, logging_steps=logging, **SAVING)
    said = str(told.value)
    assert spoil.name in said or logging > 1  # two steps later all weights are NaN
    assert "holds NaN or infinity after step" in said and "resume from checkpoint-4, whose weights are finite" in said
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    assert saved.not_finite(newest_whole(tmp_path)) == 0 and not (tmp_path / "model.safetensors").exists()
    # What the sentence advises is possible.
    trainer, _ = train(tiny("llama"), rows, tmp_path, resume=str(newest_whole(tmp_path)), save=True, **SAVING)
    assert saved.not_finite(tmp_path) == 0 and trainer.state.global_step == 6


def test_it_is_noticed_at_the_end_too_and_with_no_checkpoint_at_all(rows, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    before = saved.raw_tensors(tmp_path)
    with pytest.raises(MamaError, match="after step 6.*start anew, since no checkpoint is whole"):
        train(tiny("llama"), rows, tmp_path, callbacks=[Spoil(5)], logging_steps=100, save=True)
    assert saved.raw_tensors(tmp_path).keys() == before.keys() and saved.not_finite(tmp_path) == 0


@pytest.mark.parametrize("strategy", ["epoch", "best"])
def test_it_is_noticed_before_a_save_at_an_epochs_end_or_after_an_evaluation(rows, tmp_path, strategy):
    changes = {"save_strategy": strategy, "eval_strategy": "epoch", "per_device_train_batch_size": 128, "max_steps": 8,
               "logging_steps": 100, "metric_for_best_model": "loss"}
    with pytest.raises(MamaError, match="holds NaN or infinity"):
        train(tiny("llama"), rows, tmp_path, callbacks=[Spoil(5)], **changes)
    assert all(saved.not_finite(path) == 0 for path in checkpoints(tmp_path))


def test_a_callback_that_saves_on_its_own_saves_no_nan_either(rows, tmp_path):
    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            control.should_save = True

    good = tmp_path / "good"
    with pytest.raises(MamaError, match="holds NaN or infinity"):
        train(tiny("llama"), rows, tmp_path, callbacks=[Spoil(4), Save()], logging_steps=100)
    assert checkpoints(tmp_path)[-1].name in ("checkpoint-4", "checkpoint-5")
    assert all(saved.not_finite(path) == 0 for path in checkpoints(tmp_path))
    assert newest_whole(tmp_path).name == "checkpoint-4"
    trainer, _ = train(tiny("llama"), rows, tmp_path / "other")
    trainer.save_model(str(good))
    before = (good / "model.safetensors").read_bytes()
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")
    for save in (trainer.save_model, trainer.model.save_pretrained):
        with pytest.raises(MamaError, match="nothing is saved in"):
            save(str(good))
    assert (good / "model.safetensors").read_bytes() == before


def test_a_checkpoint_of_nan_never_becomes_whole(rows, tmp_path):
    """Of a model whose save nobody watches (a plain module), when another callback asks for it."""

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            vars(model).pop("save_pretrained", None)
            control.should_save = True

    with pytest.raises(MamaError, match="after step 5.*resume from checkpoint-4"):
        train(tiny("llama"), rows, tmp_path, callbacks=[Spoil(4), Save()], logging_steps=100)
    assert newest_whole(tmp_path).name == "checkpoint-4" and saved.not_finite(tmp_path / "checkpoint-4") == 0


def test_a_model_that_comes_with_a_nan_is_refused(rows, tmp_path):
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight[0] = float("inf")
    with pytest.raises(MamaError, match="model.norm.weight holds NaN or infinity before the first step"):
        train(model, rows, tmp_path)


@pytest.mark.parametrize("method", ["mama", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_calibration_token_makes_no_nan(make_model, rows, tmp_path, method, architecture):
    model = make_model(architecture)
    try:
        prune(model, rows[:1, :1], method, 0.5, progress=False)
    except MamaError as error:
        assert "calibration" in str(error)
        return
    model.save_pretrained(tmp_path)
    assert saved.not_finite(tmp_path) == 0 and saved.sparsity(tmp_path) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("redistribution", ["none", "mean", "bias", "least_squares"])
def test_a_mask_update_on_one_token_saves_no_nan(rows, tmp_path, redistribution):
    config = MamaConfig(sparsity=0.75, mask_start=3, calibration_tokens=1, redistribution=redistribution)
    try:
        train(tiny("llama"), rows, tmp_path, config, save=True)
    except MamaError as error:
        assert any(word in str(error) for word in ("NaN or infinity", "calibration"))
        assert not (tmp_path / "model.safetensors").exists()
        return
    assert saved.not_finite(tmp_path) == 0 and saved.sparsity(tmp_path) == pytest.approx(0.75, abs=1e-3)


def test_a_pruning_that_makes_nan_is_refused(rows, tmp_path, monkeypatch):
    """Whatever the solver does, nothing of it is saved."""
    from mama_trl.pruning import prune as module
    from mama_trl.solvers.problem import Solution

    def broken(problem):
        return Solution(problem.weight * float("nan"), problem.weight > 0, problem.bias)

    monkeypatch.setattr(module._Sweep, "solve", lambda self, measured: self.placement.write(
        measured.targets,
        {t.name: broken(self._problem(t, measured)) for t in measured.targets},
    ))
    with pytest.raises(MamaError, match="pruning made NaN or infinity of .*nothing is saved"):
        prune(tiny("llama"), rows[:8], "magnitude", 0.5, progress=False)


def test_a_nan_weight_of_the_loss_stops_the_run(rows, tmp_path, tokenizer):
    """As a user can set it after all checks: the run stops at its first look at the weights."""
    from mama_trl import MamaDistillationConfig, MamaDistillationTrainer
    from tests.training.runs import dataset
    from tests.training.test_trainers import COMMON

    student = tiny("llama")
    prune(student, rows[:8], "magnitude", 0.5, progress=False)
    args = MamaDistillationConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, **COMMON,
    )
    args.cross_entropy_weight = float("nan")
    trainer = MamaDistillationTrainer(
        student, teacher_model=tiny("llama"), args=args, train_dataset=dataset(rows), processing_class=tokenizer
    )
    with pytest.raises(MamaError, match="holds NaN or infinity after step 1"):
        trainer.train()


def test_no_trainer_state_is_left_behind(rows, tmp_path):
    """The optimizer steps again after a run that stopped."""
    trainer, mama = trainer_of(tiny("llama"), rows, tmp_path, callbacks=[Spoil(1)])
    with pytest.raises(MamaError):
        trainer.train()
    trainer.model.load_state_dict(tiny("llama").state_dict())
    trainer.pop_callback(Spoil)
    mama.config = MamaConfig(sparsity=0.75, mask_start=3, inherit_masks=False)
    trainer.optimizer = None
    trainer.train()
    trainer.save_model(str(tmp_path))
    assert saved.sparsity(tmp_path) == pytest.approx(0.75, abs=1e-3)


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("rewards, said", [
    ([None], "no reward of a whole generation is a number .* gave NaN or None"),
    ([NAN], "no reward of a whole generation is a number"),
    ([1.0, 0.0, INFINITY, 2.0], "gave infinity"),
    ([1.0, 0.0, None, NAN], None),
])
def test_rewards_that_are_no_numbers_stop_a_run(tokenizer, tmp_path, rewards, said):
    args = MamaGRPOConfig(
        output_dir=str(tmp_path), sparsity=0.5, mask_start=1, max_steps=2, per_device_train_batch_size=4,
        num_generations=4, max_completion_length=4, use_cpu=True, bf16=False, report_to=[], save_strategy="no",
        disable_tqdm=True,
    )
    data = Dataset.from_list([{"prompt": "1 + 1 ="}] * 8)
    trainer = MamaGRPOTrainer(
        tiny("llama"), lambda completions, **_: (rewards * 4)[:4], args=args, train_dataset=data,
        processing_class=tokenizer,
    )
    if said is None:
        trainer.train()
        assert trainer.mama.sparsity == pytest.approx(0.5, abs=0.01)
    else:
        with refusal(said):
            trainer.train()
        assert not list(tmp_path.rglob("*.safetensors"))


def test_a_judge_that_is_away_for_a_while_stops_no_run():
    check, none, some = RewardCheck(), torch.full((4, 2), NAN), torch.tensor([[NAN, 1.0]])
    for absent in (9, 9):
        check.look(some, ["a", "b"])
        for _ in range(absent):
            check.look(none, ["a", "b"])
    with refusal("a, b gave NaN or None"):
        check.look(none, ["a", "b"])
