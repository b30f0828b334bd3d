"""Perplexity, accuracy and sparsity as they are measured."""

import math

import pytest
import torch

from mama_trl.evaluation.perplexity import perplexity
from mama_trl.evaluation.size import sparsity_by_kind
from mama_trl.evaluation.tasks import task_accuracy


def test_perplexity_by_hand(make_model, rows):
    model = make_model("llama").eval()
    found = perplexity(model, rows[:5], batch_size=2)
    with torch.no_grad():
        losses = [model(input_ids=row[None], labels=row[None]).loss.item() for row in rows[:5]]
    assert found["nats"] == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats"]))
    assert found["tokens"] == 5 * 31 and found["sequence_length"] == 32


def test_accuracy_keeps_the_order_of_unequal_prompts(make_model, tokenizer):
    """Greedy completions batched by length equal those made one by one."""
    from mama_trl.evaluation.tasks import generate

    model = make_model("llama")
    prompts = ["1+1=", "12345+67890=", "def f(", "7+8="]
    together = generate(model, tokenizer, prompts, 5, batch_size=4)
    alone = [generate(model, tokenizer, [prompt], 5)[0] for prompt in prompts]
    assert together == alone
    seen = []
    task_accuracy(model, tokenizer, prompts, list("abcd"), lambda completions, answer: seen.extend(answer) or [1.0] * 4)
    assert seen == list("abcd")


def test_sparsity_by_kind_counts_zeros(make_model):
    model = make_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data[:32] = 0  # half of one of two
    found = sparsity_by_kind(model)
    assert found["up_proj"] == pytest.approx(0.25) and found["q_proj"] == 0.0
    assert 0 < found["all"] < 0.25
