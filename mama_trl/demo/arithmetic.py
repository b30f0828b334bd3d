"""A task with verifiable answers: sums of two numbers, with held-out pairs of operands."""

import random
import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sums:
    """`(prompt, answer)` pairs such as `("12+7=", "19")`; no pair of operands is in both parts."""

    train: list[tuple[str, str]]
    heldout: list[tuple[str, str]]
    description: str

    @property
    def facts(self) -> dict:
        return {
            "description": self.description,
            "train": len(self.train),
            "heldout": len(self.heldout),
            "examples": [list(pair) for pair in self.heldout[:3]],
        }


def sums(low: int = 10, high: int = 50, seed: int = 0, heldout_share: float = 0.2) -> Sums:
    """All sums a+b with low <= a, b < high; a pair is held out in both orders."""
    pairs = [(a, b) for a in range(low, high) for b in range(a, high)]
    random.Random(seed).shuffle(pairs)
    count = round(len(pairs) * heldout_share)

    def both_orders(some):
        ordered = [p for a, b in some for p in dict.fromkeys([(a, b), (b, a)])]
        return [(f"{a}+{b}=", str(a + b)) for a, b in ordered]

    return Sums(
        both_orders(pairs[count:]),
        both_orders(pairs[:count]),
        f"sums of two numbers from {low} to {high - 1}; {heldout_share:.0%} of the operand pairs are held out",
    )


def demonstrations(tokenizer, pairs: list[tuple[str, str]], rows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Solved sums, one a line, packed into rows.

    Returns:
        (token ids, labels), int64 (rows, length); labels are -100 but for answers and line ends, since the
        operands are random and nothing can be learned from them.
    """
    tokens = {pair: (_ids(tokenizer, pair[0]), _ids(tokenizer, pair[1] + "\n")) for pair in pairs}
    draw = random.Random(seed)
    ids: list[int] = []
    labels: list[int] = []
    while len(ids) < rows * length:
        prompt, answer = tokens[draw.choice(pairs)]
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
    shape = (rows, length)
    return torch.tensor(ids[: rows * length]).view(shape), torch.tensor(labels[: rows * length]).view(shape)


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def first_number(completion: str) -> str | None:
    """The number a completion starts with, up to anything that is no digit; None if there is none."""
    match = re.match(r"\s*(-?\d+)", completion)
    return match[1] if match else None


def correct(completions, answer, **kwargs) -> list[float]:
    """Reward function for TRL: 1.0 where the completion starts with the answer and goes on with no digit."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(first_number(text) == str(expected)) for text, expected in zip(texts, answer)]
