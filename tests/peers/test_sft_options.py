"""Every option of SFT with masks on, with the callback and in distillation: no zero comes back, nothing is lost."""

import pytest
import torch
from trl import SFTConfig, SFTTrainer

from mama_trl import MamaCallback, MamaConfig, MamaDistillationConfig, MamaDistillationTrainer

from . import made
from .runs import COMMON, MASKED, SAVED, check_masks, keys

EVALUATED = dict(eval_strategy="steps", eval_steps=2)
CHECKPOINTED = dict(gradient_checkpointing=True)
# name: (kind of data, options of the config, arguments of the trainer)
QUICK = {
    "text": ("text", {}, {}),
    "packing bfd": ("text", dict(packing=True, max_length=48, num_train_epochs=8), {}),
    "packing wrapped": ("text", dict(packing=True, packing_strategy="wrapped", max_length=48, num_train_epochs=8), {}),
    "padding-free": ("text", dict(padding_free=True, max_length=None, pad_to_multiple_of=16), {}),
    "completion-only": ("prompt-completion", {}, {}),
    "assistant-only": ("messages", dict(assistant_only_loss=True), {}),
    "evaluation": ("text", dict(**EVALUATED, metric_for_best_model="mean_token_accuracy"), {}),
    "mixture": ("text", {}, dict(mixture=True)),
}
SLOW = {
    "packing bfd_split": ("text", dict(packing=True, packing_strategy="bfd_split", max_length=20), {}),
    "packed evaluation": ("text", dict(packing=True, max_length=48, eval_packing=True, **EVALUATED), {}),
    "packing, evaluation not packed": ("text", dict(packing=True, max_length=48, eval_packing=False, **EVALUATED), {}),
    "whole prompt": ("prompt-completion", dict(completion_only_loss=False), {}),
    "chat": ("messages", {}, {}),
    "conversations": ("conversations", {}, {}),
    "chat prompt-completion": ("chat prompt-completion", {}, {}),
    "tokens": ("tokens", {}, {}),
    "tokens and labels": ("tokens and labels", {}, {}),
    "not prepared": ("tokens and labels", dict(dataset_kwargs={"skip_prepare_dataset": True}), {}),
    "streaming": ("text", {}, dict(streaming=True)),
    "streaming, packed": ("text", dict(packing=True, max_length=48), dict(streaming=True)),
    "formatting function": ("question", {}, dict(formatting_func=lambda row: f"{row['q']} makes {row['a']}")),
    "checkpointing": ("text", CHECKPOINTED, {}),
    "reentrant": ("text", {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}),
    "selective": ("text", {**CHECKPOINTED, "gradient_checkpointing_kwargs": {"selective": True}}, {}),
    "accumulation": ("text", dict(gradient_accumulation_steps=3, num_train_epochs=9), {}),
    "tokens not averaged": ("text", dict(average_tokens_across_devices=False), {}),
    "truncated": ("text", dict(max_length=12), {}),
    "truncated on the left": ("text", dict(max_length=12, truncation_mode="keep_end"), {}),
    "no length": ("text", dict(max_length=None), {}),
    "padded to 8": ("text", dict(pad_to_multiple_of=8), {}),
    "shuffled": ("text", dict(shuffle_dataset=True), {}),
    "another end": ("text", dict(eos_token="<|im_end|>"), {}),
    "noise": ("text", dict(neftune_noise_alpha=5.0), {}),
    "bf16": ("text", dict(model_init_kwargs={"dtype": "bfloat16"}), dict(by_name=True)),
    "by name": ("text", {}, dict(by_name=True)),
    "compiled": ("text", dict(torch_compile=True, torch_compile_backend="eager"), {}),
    "sgd": ("text", dict(optim="sgd"), {}),
    "clipped": ("text", dict(max_grad_norm=0.01, weight_decay=0.1), {}),
    "no auxiliary loss": ("text", dict(router_aux_loss_coef=0.0), dict(mixture=True)),
    "a stronger auxiliary loss": ("text", dict(router_aux_loss_coef=2.0), dict(mixture=True)),
    "column": ("question", dict(dataset_text_field="q"), {}),
}
# SFT's own loss in its shapes; in distillation they shape the cross-entropy.
LOSSES = {
    "dft": ("prompt-completion", dict(loss_type="dft"), {}),
    "smoothed": ("prompt-completion", dict(label_smoothing_factor=0.1), {}),
    "chunked": ("prompt-completion", dict(loss_type="chunked_nll"), {}),
}


def metrics(prediction):
    return {"seen": float((prediction.label_ids != -100).sum())}


def build(kind: str, options: dict, extra: dict, folder, masked: bool):
    """SFTTrainer with the callback, or our distillation; without masks the plain SFTTrainer."""
    extra = dict(extra)
    mixture, streaming, by_name = (extra.pop(name, False) for name in ("mixture", "streaming", "by_name"))
    data, own = options.pop("data"), {**COMMON, **SAVED, "max_length": 64, **options}
    common = dict(train_dataset=made.dataset(data, streaming), processing_class=made.tokenizer(), **extra)
    if own.get("eval_strategy"):
        common["eval_dataset"] = made.dataset(data)
    model = made.saved(folder / "start", mixture=mixture) if by_name else made.model(mixture=mixture)
    if not masked:
        return SFTTrainer(model, SFTConfig(output_dir=str(folder), **own), **common)
    if kind == "sft":
        callback = MamaCallback(MamaConfig(**MASKED))
        return SFTTrainer(model, SFTConfig(output_dir=str(folder), **own), callbacks=[callback], **common)
    if own.get("loss_type") or own.get("label_smoothing_factor"):
        own["cross_entropy_weight"] = 0.5
    args = MamaDistillationConfig(output_dir=str(folder), **MASKED, **own)
    return MamaDistillationTrainer(model, args, teacher_model=made.model(1), **common)


def try_option(kind: str, case: tuple, folder) -> None:
    data, options, extra = case
    logged = {}
    for masked in (False, True):
        trainer = build(kind, {"data": data, **options}, extra, folder / str(masked), masked)
        trainer.train()
        logged[masked] = keys(trainer)
    check_masks(trainer, folder / "True")
    assert logged[False] <= logged[True], f"lost: {logged[False] - logged[True]}"


def slow_where_the_other_kind_shows_it(kind: str, name: str):
    quick = {"sft": ("text", "packing bfd", "packing wrapped", "padding-free", "assistant-only"),
             "distillation": ("packing bfd", "completion-only", "evaluation", "mixture")}
    return pytest.param(kind, name, marks=[] if name in quick[kind] else [pytest.mark.slow])


@pytest.mark.parametrize(
    "kind, name", [slow_where_the_other_kind_shows_it(k, n) for k in ("sft", "distillation") for n in QUICK]
)
def test_option(kind, name, tmp_path):
    try_option(kind, QUICK[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "distillation"])
@pytest.mark.parametrize("name", [*SLOW, *LOSSES])
def test_further_option(kind, name, tmp_path):
    try_option(kind, {**SLOW, **LOSSES}[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "distillation"])
def test_numbers_of_ones_own(kind, tmp_path):
    options = {**EVALUATED, "metric_for_best_model": "seen", "greater_is_better": True}
    try_option(kind, ("text", options, dict(compute_metrics=metrics)), tmp_path)


def mean_loss(outputs, labels, num_items_in_batch=None):
    logits, wanted = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, wanted)


@pytest.mark.slow
def test_a_loss_of_ones_own(tmp_path):
    try_option("sft", ("text", {}, dict(compute_loss_func=mean_loss)), tmp_path)
