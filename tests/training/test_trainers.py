"""GRPO, distillation and other TRL trainers on three architectures with different layers."""

import copy

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from mama_trl import (
    MamaCallback,
    MamaConfig,
    MamaDistillationConfig,
    MamaDistillationTrainer,
    MamaError,
    MamaGRPOConfig,
    MamaGRPOTrainer,
)
from mama_trl.demo import arithmetic
from mama_trl.training.distillation.losses import forward_kl
from tests.helpers import ZeroCheck

ARCHITECTURES = ["llama", "gpt2", "qwen3"]
COMMON = dict(
    use_cpu=True, bf16=False, report_to=[], logging_steps=1, disable_tqdm=True, save_strategy="no",
    gradient_checkpointing=False,
)


def prompts():
    return Dataset.from_list([{"prompt": p, "answer": a} for p, a in arithmetic.sums(10, 20).train])


def lengths(completions, **kwargs):
    return [float(len(text) % 3) for text in completions]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_grpo_prunes_by_reward(make_model, tokenizer, tmp_path, architecture):
    model = make_model(architecture)
    args = MamaGRPOConfig(
        output_dir=str(tmp_path), sparsity=0.8, mask_start=2, max_steps=4, per_device_train_batch_size=8,
        num_generations=4, max_completion_length=6, learning_rate=1e-3, **COMMON,
    )
    trainer = MamaGRPOTrainer(model, [lengths], args=args, train_dataset=prompts(), processing_class=tokenizer)
    check = ZeroCheck(trainer.mama)
    trainer.add_callback(check)
    trainer.train()
    assert check.steps == 3 and check.violations == 0
    assert trainer.mama.sparsity == pytest.approx(0.8, abs=0.01)
    # Only reward attribution is recorded here; the trajectory of earlier stages is left as it is.
    counts = trainer.mama.trajectory.counts
    assert 2 <= int(counts["reward"]) <= 4 and int(counts["sensitivity"]) == 0
    row = next(row for row in reversed(trainer.state.log_history) if "reward" in row)
    assert row["mama/sparsity"] == pytest.approx(0.8, abs=0.01)


def test_attribution_is_the_gradient_of_grpos_own_loss(make_model, tokenizer, tmp_path):
    """The root mean square over one step is |w ∂L/∂w| / ‖∂L/∂w‖, hand-computed before the step."""
    model = make_model("llama")
    args = MamaGRPOConfig(
        output_dir=str(tmp_path), sparsity=0.0, max_steps=1, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=6, **COMMON,
    )
    trainer = MamaGRPOTrainer(model, [lengths], args=args, train_dataset=prompts(), processing_class=tokenizer)
    seen = {}
    record = trainer.mama.on_pre_optimizer_step

    def look(*arguments, **kwargs):
        names = trainer.mama.trajectory.values["reward"]
        followed = {n: p for n, p in model.named_parameters() if n in names}
        norm = torch.cat([p.grad.flatten() for p in followed.values()]).norm()
        seen.update({n: (p.data * p.grad / norm).abs() for n, p in followed.items()})
        return record(*arguments, **kwargs)

    trainer.mama.on_pre_optimizer_step = look
    trainer.train()
    assert seen and any(value.max() > 0 for value in seen.values())
    for name, value in trainer.mama.trajectory.importance("reward").items():
        assert torch.allclose(value, seen[name], rtol=1e-2, atol=1e-9), name


def test_equal_rewards_leave_the_attribution_alone(make_model, tokenizer, tmp_path):
    args = MamaGRPOConfig(
        output_dir=str(tmp_path), sparsity=0.0, max_steps=2, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=4, **COMMON,
    )
    trainer = MamaGRPOTrainer(
        make_model("llama"), [lambda completions, **_: [1.0] * len(completions)], args=args, train_dataset=prompts(),
        processing_class=tokenizer,
    )
    trainer.train()
    assert int(trainer.mama.trajectory.counts["reward"]) == 0
    assert int(trainer.mama.trajectory.skipped) == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_distillation_holds_masks_and_comes_nearer(make_model, tokenizer, rows, tmp_path, architecture):
    from mama_trl import prune

    dense = make_model(architecture)
    student = copy.deepcopy(dense)
    prune(student, rows[:16], "magnitude", 0.7, progress=False).save(tmp_path / "pruned")
    student.save_pretrained(tmp_path / "pruned")
    student = type(dense).from_pretrained(tmp_path / "pruned")
    args = MamaDistillationConfig(
        output_dir=str(tmp_path / "out"), sparsity=0.7, max_steps=20, per_device_train_batch_size=8,
        learning_rate=3e-3, max_length=None, dataset_kwargs={"skip_prepare_dataset": True}, **COMMON,
    )
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")
    trainer = MamaDistillationTrainer(
        student, teacher_model=dense, args=args, train_dataset=data, processing_class=tokenizer
    )
    check = ZeroCheck(trainer.mama)
    trainer.add_callback(check)
    trainer.train()
    losses = [row["mama/kl"] for row in trainer.state.log_history if "mama/kl" in row]
    assert check.steps == 20 and check.violations == 0
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert trainer.mama.sparsity == pytest.approx(0.7, abs=0.01)


def test_forward_kl_by_hand():
    teacher = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
    student = torch.log(torch.tensor([[0.25, 0.25, 0.5]])) + 3.0  # logits are free up to a constant
    expected = 0.5 * torch.log(torch.tensor(2.0)) + 0.25 * torch.log(torch.tensor(0.5))
    assert torch.allclose(forward_kl(student, teacher), expected.view(1))
    assert torch.allclose(forward_kl(student / 2, teacher / 2, temperature=0.5), expected.view(1) / 4)


def test_teacher_with_another_vocabulary_or_none_is_refused(make_model, tokenizer, tmp_path):
    args = MamaDistillationConfig(output_dir=str(tmp_path), **COMMON)
    data = Dataset.from_dict({"text": ["a b c"] * 4})
    with pytest.raises(MamaError, match="vocabulary of 100 tokens and the student one of 384"):
        MamaDistillationTrainer(
            make_model("llama"), teacher_model=make_model("llama", vocab=100), args=args, train_dataset=data,
            processing_class=tokenizer,
        )
    with pytest.raises(MamaError, match="teacher_model"):
        MamaDistillationTrainer(make_model("llama"), args=args, train_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_plain_trl_trainers_take_the_callback(make_model, tokenizer, tmp_path, kind):
    mama = MamaCallback(MamaConfig(sparsity=0.6, mask_start=2))
    check = ZeroCheck(mama)
    common = dict(output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, **COMMON)
    options = dict(processing_class=tokenizer, callbacks=[mama, check])
    texts = [p + a + "\n" for p, a in arithmetic.sums(10, 16).train]
    if kind == "sft":
        data = Dataset.from_dict({"text": texts})
        trainer = SFTTrainer(make_model("llama"), args=SFTConfig(**common), train_dataset=data, **options)
    elif kind == "dpo":
        rows = [{"prompt": p, "chosen": a, "rejected": "0"} for p, a in arithmetic.sums(10, 16).train]
        make_model("llama").save_pretrained(tmp_path / "policy")
        model = type(make_model("llama")).from_pretrained(tmp_path / "policy")
        trainer = DPOTrainer(model, args=DPOConfig(**common), train_dataset=Dataset.from_list(rows), **options)
    else:
        args = GRPOConfig(num_generations=4, max_completion_length=4, **common)
        trainer = GRPOTrainer(make_model("llama"), lengths, args=args, train_dataset=prompts(), **options)
    trainer.train()
    assert check.steps == 2 and check.violations == 0 and mama.sparsity == pytest.approx(0.6, abs=0.01)


def test_shared_fields_come_from_one_place():
    for cls in (MamaGRPOConfig, MamaDistillationConfig):
        for name, field in MamaConfig.__dataclass_fields__.items():
            assert cls.__dataclass_fields__[name].type == field.type
            assert cls.__dataclass_fields__[name].metadata == field.metadata
    for cls in (MamaGRPOConfig, MamaDistillationConfig):
        with pytest.raises(MamaError, match="sparsity"):
            cls(output_dir="x", sparsity=1.2, **COMMON)
