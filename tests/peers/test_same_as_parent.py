"""With sparsity 0 a trainer of ours, or one with the callback, is its parent: losses, logs and weights, bit for bit."""

import inspect

import numpy
import pytest
import trl
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from mama_trl import (
    MamaCallback,
    MamaConfig,
    MamaDistillationConfig,
    MamaDistillationTrainer,
    MamaGRPOConfig,
    MamaGRPOTrainer,
)

from . import made
from .files import weights_in
from .runs import COMMON, numbers

RECORD = MamaConfig(sparsity=0.0)


def rewards(completions, **kwargs):
    return [float(len(str(each)) % 5) for each in completions]


def finished(trainer, folder):
    trainer.train()
    trainer.save_model(str(folder))
    return numbers(trainer), weights_in(folder)


def assert_same(one, other):
    (log, weights), (their_log, their_weights) = one, other
    assert log == their_log
    assert weights.keys() == their_weights.keys()
    for name, values in weights.items():
        assert numpy.array_equal(values, their_weights[name]), name


def test_grpo(tmp_path):
    options = dict(max_completion_length=6, num_generations=4, **COMMON)
    runs = []
    for cls, config, own in (
        (trl.GRPOTrainer, trl.GRPOConfig, {}), (MamaGRPOTrainer, MamaGRPOConfig, {"sparsity": 0.0}),
    ):
        args = config(output_dir=str(tmp_path / cls.__name__), **options, **own)
        trainer = cls(
            made.model(), rewards, args, made.dataset("prompts"), processing_class=made.tokenizer(),
        )
        runs.append(finished(trainer, tmp_path / cls.__name__))
    assert_same(*runs)


WITH_CALLBACK = {
    "sft": (trl.SFTTrainer, trl.SFTConfig, "text", {}),
    "dpo": (trl.DPOTrainer, trl.DPOConfig, "preference", {}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, "unpaired", {}),
    "reward": (trl.RewardTrainer, trl.RewardConfig, "chat preference", {}),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, "prompts", {"num_generations": 4, "max_completion_length": 6}),
    "distillation": (trl.DistillationTrainer, trl.DistillationConfig, "prompts", {"max_completion_length": 6}),
}


def trainer_with(kind, folder, callbacks, **changes):
    """A TRL trainer of this kind on tiny models."""
    cls, config, data, own = WITH_CALLBACK[kind]
    args = config(output_dir=str(folder), **{**COMMON, **own, **changes})
    extra = {"rloo": {"reward_funcs": rewards}, "distillation": {"teacher_model": made.model(1)}}.get(kind, {})
    if kind in ("dpo", "kto", "rloo"):  # the reference is loaded from where the policy was
        model = made.saved(folder / "policy")
    else:
        model = made.classifier() if kind == "reward" else made.model()
    return cls(
        model, args=args, train_dataset=made.dataset(data), processing_class=made.tokenizer(), callbacks=callbacks,
        **extra,
    )


@pytest.mark.parametrize("kind", WITH_CALLBACK)
def test_callback_in_trl_trainers(kind, tmp_path):
    theirs = finished(trainer_with(kind, tmp_path / "theirs", []), tmp_path / "theirs")
    ours = finished(trainer_with(kind, tmp_path / "ours", [MamaCallback(RECORD)]), tmp_path / "ours")
    assert_same(ours, theirs)


def test_callback_in_a_plain_trainer(tmp_path):
    ids = [row["input_ids"][:5] for row in made.rows("tokens")]
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    runs = []
    for name, callbacks in (("theirs", []), ("ours", [MamaCallback(RECORD)])):
        options = {key: value for key, value in COMMON.items() if key != "gradient_checkpointing"}
        args = TrainingArguments(output_dir=str(tmp_path / name), **options)
        trainer = Trainer(made.model(), args=args, train_dataset=data, callbacks=callbacks)
        runs.append(finished(trainer, tmp_path / name))
    assert_same(*runs)


def test_distillation_begins_as_sft_and_logs_what_it_logs(tmp_path):
    """From the student itself there is nothing to learn: with the cross-entropy beside it, the first step is SFT's."""
    options = dict(max_length=64, eval_strategy="steps", eval_steps=2, **COMMON)
    data = {"train_dataset": made.dataset("prompt-completion"), "eval_dataset": made.dataset("prompt-completion")}
    theirs = trl.SFTTrainer(
        made.model(), trl.SFTConfig(output_dir=str(tmp_path / "theirs"), **options), processing_class=made.tokenizer(),
        **data,
    )
    args = MamaDistillationConfig(output_dir=str(tmp_path / "ours"), sparsity=0.0, cross_entropy_weight=1.0, **options)
    ours = MamaDistillationTrainer(
        made.model(), args, teacher_model=made.model(), processing_class=made.tokenizer(), **data
    )
    for trainer in (theirs, ours):
        trainer.train()
    for row, their_row in zip(numbers(ours), numbers(theirs), strict=True):
        assert row.keys() >= their_row.keys()
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens", "learning_rate"):
        assert numbers(ours)[0][key] == pytest.approx(numbers(theirs)[0][key], rel=1e-4), key


SIGNATURES = [
    (MamaGRPOTrainer, trl.GRPOTrainer, {"calibration"}),
    (MamaDistillationTrainer, trl.SFTTrainer, {"calibration", "teacher_model"}),
]


@pytest.mark.parametrize("ours, theirs, own", SIGNATURES)
def test_signature_is_the_parents_with_ours_behind(ours, theirs, own):
    mine, parents = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert list(mine)[: len(parents)] == list(parents)
    assert all(mine[name].default == parents[name].default for name in parents)
    assert set(mine) - set(parents) == own
    assert all(mine[name].kind is inspect.Parameter.KEYWORD_ONLY for name in own)


@pytest.mark.parametrize("ours, theirs", [
    (MamaGRPOConfig, trl.GRPOConfig), (MamaDistillationConfig, trl.SFTConfig),
])
def test_configs_keep_the_parents_defaults(ours, theirs):
    shared = set(theirs.__dataclass_fields__)
    for name in shared:
        mine, parents = ours.__dataclass_fields__[name], theirs.__dataclass_fields__[name]
        assert (mine.default, mine.default_factory) == (parents.default, parents.default_factory), name
