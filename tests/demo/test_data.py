"""The demo's text, tokenizer and task."""

import torch

from mama_trl.demo import arithmetic, corpus


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
