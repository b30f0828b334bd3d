"""Text from a file or a dataset, cut into sequences of token ids."""

from pathlib import Path
from typing import Any, Iterator

import torch
from torch import Tensor

from ..errors import MamaError
from .sources import (
    KINDS,
    check_file_name,
    check_text,
    is_lines,
    is_plain_text,
    one_split,
    open_data,
    read_plain,
)


def read_text(source: str | Path, split: str = "train") -> str:
    """A plain text file as it stands, or the `text` column of any other file, folder or datasets name.

    Documents are joined by a blank line. Raises `MamaError` if nothing readable is there.
    """
    if is_plain_text(source):
        text = read_plain(source)
    else:
        text = "\n\n".join(_texts(one_split(open_data(source), split, source), source))
    if not text.strip():
        raise MamaError(f"{source} holds no text: give {KINDS}.")
    return text


def _texts(data: Any, source: str | Path) -> Iterator[str]:
    if "text" not in data.column_names:
        raise MamaError(f"{source} has no column `text`, only {', '.join(data.column_names)}: rename one.")
    row = "line" if is_lines(source) else "row"
    try:
        texts = list(data["text"])
    except UnicodeDecodeError as error:
        raise MamaError(f"{source} holds texts that are no UTF-8 ({error.reason}): save it again.") from None
    for number, text in enumerate(texts, 1):
        yield check_text(text, f"{source}, {row} {number}, `text`")


def blocks(tokenizer, text: str, sequence_length: int, limit: int | None = None, seed: int | None = None) -> Tensor:
    """int64 (n, sequence_length): `text` without special tokens, the incomplete last block dropped.

    Args:
        limit: at most so many blocks; the first ones, or with `seed` drawn at random.

    Raises:
        MamaError: the text is shorter than one block.
    """
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False).input_ids[0]
    count = ids.numel() // sequence_length
    if count == 0:
        raise MamaError(
            f"the text has {ids.numel()} tokens, fewer than `sequence_length` ({sequence_length}): give more text or "
            "a shorter sequence."
        )
    rows = ids[: count * sequence_length].view(count, sequence_length)
    if seed is not None:
        rows = rows[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    return rows[:limit]


def calibration_rows(tokenizer, source: str, length: int, tokens: int, seed: int):
    """int64 (n, length) drawn with `seed` from the text in `source`, about `tokens` tokens in all."""
    check_file_name(source)
    return blocks(tokenizer, read_text(source), length, limit=max(1, tokens // length), seed=seed)


def heldout_text(source: str) -> str:
    """Text to measure on: a file, or the test split of a dataset. Raises `MamaError`."""
    check_file_name(source)
    return read_text(source, split="test")
