import math

import pytest
import torch

from mama_trl import MamaError
from mama_trl.demo import arithmetic, corpus
from mama_trl.evaluation.perplexity import perplexity
from mama_trl.evaluation.size import sparsity_by_kind
from mama_trl.evaluation.tasks import task_accuracy
from mama_trl.evaluation.text import blocks, read_text


def test_corpus_is_split_by_file_and_repeatable():
    one, two = (corpus.standard_library(3, max_characters=300_000) for _ in range(2))
    assert one == two and len(one.sha256) == 64
    assert not set(one.train) & set(one.heldout) and one.heldout
    assert corpus.standard_library(4, max_characters=300_000).sha256 != one.sha256


def test_tokenizer_round_trips_and_splits_digits(tokenizer, text):
    for sample in (text[:2000], "123+45=168\n", "naïve — Ω\t\x00"):
        ids = tokenizer(sample, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == sample
    assert len(tokenizer("12345", add_special_tokens=False).input_ids) == 5


def test_heldout_operands_are_never_trained_on_in_either_order():
    task = arithmetic.sums(10, 50, seed=1)
    assert not {p for p, _ in task.train} & {p for p, _ in task.heldout}
    assert len(task.train) + len(task.heldout) == 40 * 40
    swapped = {"+".join(reversed(p[:-1].split("+"))) + "=" for p, _ in task.heldout}
    assert swapped == {p for p, _ in task.heldout}
    assert all(eval(p[:-1]) == int(a) for p, a in task.train + task.heldout)


def test_demonstrations_train_only_on_answers(tokenizer):
    task = arithmetic.sums(10, 20)
    ids, labels = arithmetic.demonstrations(tokenizer, task.train, 4, 64, seed=0)
    assert ids.shape == labels.shape == (4, 64)
    first = tokenizer.decode(ids[0]).split("\n")[0]
    assert eval(first.split("=")[0]) == int(first.split("=")[1])
    kept = tokenizer.decode(labels[0][labels[0] != -100])
    assert "+" not in kept and "=" not in kept and kept.split("\n")[0] == first.split("=")[1]
    assert torch.equal(ids[labels != -100], labels[labels != -100])


def test_the_reward_checks_the_whole_number():
    completions = ["19", "19\n12", "190", "", " 19 and", "1 9"]
    assert arithmetic.correct(completions, ["19"] * 6) == [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]
    assert arithmetic.correct([[{"role": "assistant", "content": "7\n"}]], ["7"]) == [1.0]


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


@pytest.mark.parametrize(
    "name,content,word",
    [("empty.txt", b"", "no text"), ("bad.txt", b"\xff\xfe\xfa", "UTF-8"), ("bad.jsonl", b"{\"a\": 1}\n", "text")],
)
def test_bad_text_files_are_said(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MamaError, match=word):
        read_text(tmp_path / name)


def test_jsonl_and_short_text(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text(tmp_path / "a.jsonl") == "one\n\ntwo"
    with pytest.raises(MamaError, match="sequence_length"):
        blocks(tokenizer, "one", 32)
