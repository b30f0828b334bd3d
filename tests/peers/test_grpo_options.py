"""Every option of GRPO with masks on: no zero comes back, and every number that the parent logs is logged."""

import pytest
from trl import GRPOConfig, GRPOTrainer

from mama_trl import MamaGRPOConfig, MamaGRPOTrainer

from . import made
from .runs import COMMON, MASKED, SAVED, check_masks, keys


def lengths(completions, **kwargs):
    return [float(len(str(each)) % 5) for each in completions]


def matches(completions, answer, log_metric=None, log_extra=None, **kwargs):
    found = [float(str(wanted) in str(each)) for each, wanted in zip(completions, answer)]
    if log_metric:
        log_metric("matched", sum(found))
    if log_extra:
        log_extra("wanted", list(answer))
    return found


def sometimes(completions, **kwargs):
    return [None if i % 2 else 1.0 + i % 3 for i in range(len(completions))]


async def later(completions, **kwargs):
    return [float(len(str(each)) % 3) for each in completions]


# name: (kind of data, options of the config, arguments of the trainer)
QUICK = {
    "plain": ("prompts", {}, {}),
    "reference": ("prompts", dict(beta=0.1), dict(by_name=True)),
    "iterations": ("prompts", dict(num_iterations=2), {}),
    "steps per generation": ("prompts", dict(steps_per_generation=2), {}),
    "several rewards": ("prompts", dict(reward_weights=[0.3, 0.7]), dict(reward_funcs=[lengths, matches])),
    "evaluation": ("prompts", dict(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4), {}),
}
SLOW = {
    **{
        f"loss {name}": ("prompts", dict(loss_type=name), {})
        for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
    },
    "chat": ("chat prompts", {}, {}),
    "streaming": ("prompts", {}, dict(streaming=True)),
    "checkpointing": ("prompts", dict(gradient_checkpointing=True), {}),
    "accumulation": ("prompts", dict(gradient_accumulation_steps=2, num_train_epochs=4), {}),
    "generations over steps": ("prompts", dict(gradient_accumulation_steps=2, steps_per_generation=4), {}),
    "generation batch": ("prompts", dict(generation_batch_size=8), {}),
    "reward that is not always": ("prompts", {}, dict(reward_funcs=[lengths, sometimes])),
    "reward that waits": ("prompts", {}, dict(reward_funcs=[later])),
    "reward model": ("prompts", {}, dict(reward_model=True)),
    "rewards not scaled": ("prompts", dict(scale_rewards="none"), {}),
    "rewards scaled by batch": ("prompts", dict(scale_rewards="batch"), {}),
    "aggregated after normalising": (
        "prompts", dict(multi_objective_aggregation="normalize_then_sum"), dict(reward_funcs=[lengths, matches])
    ),
    "sequence level": ("prompts", dict(importance_sampling_level="sequence"), {}),
    "two-sided clipping": ("prompts", dict(delta=2.0), {}),
    "clip higher": ("prompts", dict(epsilon=0.1, epsilon_high=0.3, num_iterations=2), {}),
    "high entropy only": ("prompts", dict(top_entropy_quantile=0.4), {}),
    "entropy bonus": ("prompts", dict(entropy_coef=0.01), {}),
    "truncated ones masked": ("prompts", dict(mask_truncated_completions=True), {}),
    "reference that follows": (
        "prompts", dict(beta=0.1, sync_ref_model=True, ref_model_sync_steps=2), dict(by_name=True)
    ),
    "completions logged": ("prompts", dict(log_completions=True, num_completions_to_print=1), {}),
    "sampling": ("prompts", dict(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.1), {}),
    "greedy kwargs": ("prompts", dict(generation_kwargs={"no_repeat_ngram_size": 3}), {}),
    "mixture": ("prompts", {}, dict(mixture=True)),
    "shuffled not": ("prompts", dict(shuffle_dataset=False), {}),
    "dropout kept": ("prompts", dict(disable_dropout=False), {}),
    "by name": ("prompts", {}, dict(by_name=True)),
    "head in fp32": ("prompts", dict(cast_lm_head_to_fp32=True), {}),
}


def build(options: dict, extra: dict, folder, masked: bool):
    """Ours with masks, or the plain GRPOTrainer."""
    extra = {"reward_funcs": lengths, **extra}
    mixture, streaming, by_name = (extra.pop(name, False) for name in ("mixture", "streaming", "by_name"))
    if extra.pop("reward_model", False):
        extra |= {"reward_funcs": made.classifier(), "reward_processing_classes": made.tokenizer()}
    data = options.pop("data")
    own = {**COMMON, **SAVED, "max_completion_length": 6, "num_generations": 4, **options}
    common = dict(train_dataset=made.dataset(data, streaming), processing_class=made.tokenizer(), **extra)
    if own.get("eval_strategy"):
        common["eval_dataset"] = made.dataset(data).select(range(2))
    model = made.saved(folder / "start", mixture=mixture) if by_name else made.model(mixture=mixture)
    if not masked:
        return GRPOTrainer(model, args=GRPOConfig(output_dir=str(folder), **own), **common)
    return MamaGRPOTrainer(model, args=MamaGRPOConfig(output_dir=str(folder), **MASKED, **own), **common)


def try_option(case: tuple, folder) -> None:
    data, options, extra = case
    logged = {}
    for masked in (False, True):
        trainer = build({"data": data, **options}, extra, folder / str(masked), masked)
        trainer.train()
        logged[masked] = keys(trainer)
    check_masks(trainer, folder / "True")
    assert logged[False] <= logged[True], f"lost: {logged[False] - logged[True]}"


@pytest.mark.parametrize("name", QUICK)
def test_option(name, tmp_path):
    try_option(QUICK[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_further_option(name, tmp_path):
    try_option(SLOW[name], tmp_path)
