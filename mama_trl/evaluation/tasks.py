"""Accuracy on prompts with verifiable answers, by greedy generation."""

from typing import Callable

import torch
from torch import nn
from tqdm import tqdm


@torch.no_grad()
def generate(model: nn.Module, tokenizer, prompts: list[str], max_new_tokens: int, batch_size: int = 256) -> list[str]:
    """Greedy completions, without special tokens; prompts are padded on the left and kept in order."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    # Prompts of one length need no padding, so neighbours are batched by length.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    completions = [""] * len(prompts)
    for start in tqdm(range(0, len(order), batch_size), desc="generate", disable=True):
        chosen = order[start : start + batch_size]
        batch = tokenizer(
            [prompts[i] for i in chosen], return_tensors="pt", padding=True, padding_side="left",
            add_special_tokens=False,
        )
        ids = batch.input_ids.to(device)
        out = model.generate(
            input_ids=ids, attention_mask=batch.attention_mask.to(device), max_new_tokens=max_new_tokens,
            do_sample=False, pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, texts):
            completions[i] = text
    model.train(training)
    return completions


def task_accuracy(
    model: nn.Module,
    tokenizer,
    prompts: list[str],
    answers: list[str],
    reward: Callable[..., list[float]],
    max_new_tokens: int = 5,
    batch_size: int = 256,
) -> dict:
    """Share of prompts whose greedy completion earns a reward of 1 or more.

    Args:
        reward: a TRL reward function of `completions` and `answer`.
    """
    completions = generate(model, tokenizer, prompts, max_new_tokens, batch_size)
    rewards = reward(completions=completions, answer=answers)
    return {"accuracy": sum(r >= 1.0 for r in rewards) / len(prompts), "n": len(prompts)}
