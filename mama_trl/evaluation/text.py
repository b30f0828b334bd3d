"""Text from a file or a dataset, cut into sequences of token ids."""

import json
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MamaError, first_line, root_of, shown
from ..paths import exists, is_file


def read_text(source: str | Path, split: str = "train") -> str:
    """Text of a .txt file, of the `text` column of a .jsonl file, or of a datasets name or folder.

    Documents are joined by a blank line. Raises `MamaError` if nothing readable is there.
    """
    path = Path(source)
    if is_file(path):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            raise MamaError(f"{source} is not readable as UTF-8 text ({error}): give a .txt or .jsonl file.") from None
        if path.suffix in (".jsonl", ".json"):
            text = "\n\n".join(_text_of(line, f"{source}, line {n},") for n, line in _lines(text))
    else:
        text = _from_datasets(str(source), split)
    if not text.strip():
        raise MamaError(f"{source} holds no text: give a .txt file, a .jsonl file with `text`, or a datasets name.")
    return text


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank, by number from 1; only line feeds end one, since texts may hold the others."""
    return [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def _text_of(line: str, where: str) -> str:
    """The `text` of a line of JSON. Raises `MamaError` if it has none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MamaError(f"{where} is no JSON lines file with a column `text` ({first_line(error)}).") from None
    if not isinstance(row, dict) or "text" not in row:
        raise MamaError(f"{where} is no JSON lines file with a column `text`: it has {shown(row)}.")
    return check_text(row["text"], f"{where} `text`")


def check_text(value: object, where: str) -> str:
    """`value`, if a tokenizer can read it. Raises `MamaError` for null, numbers, lists and halves of characters."""
    if not isinstance(value, str):
        raise MamaError(f"{where} is {shown(value)}, no text: take the row out, or write the text in quotes.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MamaError(f"{where} has a lone surrogate, half of a character: write the whole one, or none.") from None
    return value


def _from_datasets(name: str, split: str) -> str:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, split=split)
    except Exception as error:
        raise MamaError(
            f"{name} is neither a file nor a dataset that can be loaded ({root_of(error)}): give a .txt file, a "
            ".jsonl file with `text`, or a datasets name."
        ) from None
    if "text" not in dataset.column_names:
        raise MamaError(f"dataset {name} has no column `text`, only {', '.join(dataset.column_names)}.")
    rows = enumerate(dataset["text"])
    return "\n\n".join(check_text(text, f"dataset {name}, row {row}, `text`") for row, text in rows)


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


DATA_FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet", ".csv": "csv"}


def check_file_name(source: str) -> None:
    """Raises `MamaError` for a name that can only be a file and is none, before it is looked up on the hub."""
    looks_local = source.startswith((".", "/", "~")) or Path(source).suffix in DATA_FORMATS
    if not exists(source) and (looks_local or not source.isprintable() or not 0 < len(source) < 1000):
        raise MamaError(f"{source} does not exist: give a .txt file, a .jsonl file, or a datasets name.")


def calibration_rows(tokenizer, source: str, length: int, tokens: int, seed: int):
    """int64 (n, length) drawn with `seed` from the text in `source`, about `tokens` tokens in all."""
    check_file_name(source)
    return blocks(tokenizer, read_text(source), length, limit=max(1, tokens // length), seed=seed)


def heldout_text(source: str) -> str:
    """Text to measure on: a file, or the test split of a dataset. Raises `MamaError`."""
    check_file_name(source)
    return read_text(source, split="test")
