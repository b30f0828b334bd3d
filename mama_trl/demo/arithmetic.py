"""A task with verifiable answers: sums of two numbers, with held-out pairs of operands."""

import random
import re
from dataclasses import dataclass


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


def sums(limit: int = 50, seed: int = 0, heldout_share: float = 0.2) -> Sums:
    """All sums a+b with operands below `limit`; a pair is held out in both orders."""
    pairs = [(a, b) for a in range(limit) for b in range(a, limit)]
    random.Random(seed).shuffle(pairs)
    count = round(len(pairs) * heldout_share)

    def both_orders(some):
        ordered = [p for a, b in some for p in dict.fromkeys([(a, b), (b, a)])]
        return [(f"{a}+{b}=", str(a + b)) for a, b in ordered]

    return Sums(
        both_orders(pairs[count:]),
        both_orders(pairs[:count]),
        f"sums of two numbers below {limit}; {heldout_share:.0%} of the operand pairs are held out",
    )


def demonstrations(pairs: list[tuple[str, str]], count: int, seed: int) -> str:
    """`count` solved sums, drawn with replacement, one a line."""
    chosen = random.Random(seed).choices(pairs, k=count)
    return "".join(f"{prompt}{answer}\n" for prompt, answer in chosen)


def first_number(completion: str) -> str | None:
    """The number a completion starts with, up to anything that is no digit; None if there is none."""
    match = re.match(r"\s*(-?\d+)", completion)
    return match[1] if match else None


def correct(completions, answer, **kwargs) -> list[float]:
    """Reward function for TRL: 1.0 where the completion starts with the answer and goes on with no digit."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(first_number(text) == str(expected)) for text, expected in zip(texts, answer)]
