"""Reward functions for answers that can be checked."""

import re
from decimal import Decimal, InvalidOperation
from typing import Optional

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def accuracy(completions, answer, **kwargs) -> list[float]:
    """1.0 where the completion's last number equals the answer, else 0.0.

    In both, what follows the last `####` (GSM8K's mark of the final answer), or else stands in a `\\boxed{}`, is
    read instead of the whole text. Commas, dollar signs and trailing zeros do not count. An answer without a
    number is compared as text.

    Args:
        completions: texts, or lists of messages whose last one counts.
        answer: the expected answers, one for each completion.
    """
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(_same(_final(text), _final(str(expected)))) for text, expected in zip(texts, answer, strict=True)]


def _final(text: str) -> str:
    if "####" in text:
        text = text.rsplit("####", 1)[1]
    else:
        boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
        text = boxed[-1] if boxed else text
    return text.strip()


def _same(text: str, expected: str) -> bool:
    number = last_number(expected)
    return text == expected if number is None else last_number(text) == number


def last_number(text: str) -> Optional[Decimal]:
    """The last number in a text, such as 1200 of "$1,200.00."; None if there is none."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None
