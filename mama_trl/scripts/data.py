"""Datasets of the training commands."""

import os
import string
from pathlib import Path
from typing import Iterable, Optional

from ..errors import MamaError, root_of, shown
from ..evaluation.text import DATA_FORMATS, check_file_name
from ..paths import is_file

# Columns that tokenizers read, in every stage and where answers are learned.
_ASKED = ("text", "prompt", "question")
_ANSWERED = ("completion", "answer", "messages")


def load_data(script_args, dataset_args):
    """The datasets by split: `datasets:` of a recipe, a local file, or a datasets name.

    A .txt file has a column `text` with one row a paragraph.

    Raises:
        MamaError: nothing named, not loadable, empty, or without the training split.
    """
    from datasets import load_dataset
    from trl import get_dataset

    name, split = script_args.dataset_name, script_args.dataset_train_split
    if not name and not dataset_args.datasets:
        raise MamaError("`dataset_name` is missing: give a .txt or .jsonl file, a datasets name, or `datasets:`.")
    if name and not dataset_args.datasets:
        check_file_name(name)
    try:
        if dataset_args.datasets:
            data = get_dataset(dataset_args)
        elif is_file(name):
            data = _from_file(Path(name))
        else:
            data = load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    except MamaError:
        raise
    except Exception as error:  # builders raise anything, from parser errors to the hub's
        raise MamaError(f"{name or '`datasets`'} cannot be loaded as a dataset: {root_of(error)}.") from None
    if split not in data:
        raise MamaError(f"`dataset_train_split` is {shown(split)}, but {name} has only {', '.join(map(str, data))}.")
    return data


def _from_file(path: Path):
    from datasets import load_dataset

    if path.suffix not in DATA_FORMATS:
        raise MamaError(f"`dataset_name` is {path}, of no known format: use {', '.join(DATA_FORMATS)}.")
    if not os.access(path, os.R_OK):
        raise MamaError(f"`dataset_name` is {path}, which cannot be read: check its permissions.")
    if not path.stat().st_size:
        raise MamaError(f"`dataset_name` is {path}, an empty file: give one with data.")
    options = {"sample_by": "paragraph"} if path.suffix == ".txt" else {}
    return load_dataset(DATA_FORMATS[path.suffix], data_files=str(path), **options)


def split_data(data, script_args, training_args) -> tuple:
    """`(training, evaluation or None)` as the recipe names them."""
    if training_args.eval_strategy == "no":
        return data[script_args.dataset_train_split], None
    split = script_args.dataset_test_split
    if split not in data:
        raise MamaError(
            f"`dataset_test_split` is {shown(split)}, not among {', '.join(map(str, data))}: set eval_strategy no."
        )
    return data[script_args.dataset_train_split], data[split]


def prepared(script_args, training_args, dataset_args, completions: bool) -> tuple:
    """`(training, evaluation or None)` with prompts made as `with_prompts` says."""
    parts = split_data(load_data(script_args, dataset_args), script_args, training_args)
    field = getattr(training_args, "dataset_text_field", "text")
    for part in parts:
        if part is not None:
            check_rows(part, (*_ASKED, *(_ANSWERED if completions else ()), field))
            if completions and not script_args.prompt_template:
                check_learnable(part, field)
    return tuple(
        None if part is None else with_prompts(part, script_args.prompt_template, script_args.chat, completions)
        for part in parts
    )


def check_rows(dataset, columns: Iterable[str]) -> None:
    """Raises `MamaError` if a dataset has no rows, or one of `columns` (those it has) holds anything but texts.

    Instead of a text there may be messages, each with role and content. Of a stream nothing is known before it is read.
    """
    features = getattr(dataset, "features", None)
    if features is None or not hasattr(dataset, "data"):
        return
    if not len(dataset):
        raise MamaError("the dataset has no rows: give one with data.")
    for name in dict.fromkeys(columns):
        if name in features:
            check_filled(dataset, name)
            _check_kind(dataset, name, features[name])


def check_filled(dataset, name: str) -> None:
    """Raises `MamaError` if a column has rows without a value."""
    empty = dataset.data.column(name).null_count if hasattr(dataset, "data") else 0
    if empty:
        raise MamaError(f"column `{name}` is null in {empty} of {len(dataset)} rows: take them out.")


def _check_kind(dataset, name: str, kind) -> None:
    import pyarrow.compute

    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)
    if isinstance(inner, dict) and {"role", "content"} <= set(inner) and name != "text":
        return
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        said = "lists that are no messages" if inner is not None else f"{getattr(kind, 'dtype', kind)}, no text"
        raise MamaError(f"column `{name}` holds {said}: write texts in quotes, or messages with role and content.")
    lengths = pyarrow.compute.utf8_length(pyarrow.compute.utf8_trim_whitespace(dataset.data.column(name)))
    if not pyarrow.compute.max(lengths).as_py():
        raise MamaError(f"column `{name}` holds nothing but empty texts: give one with data.")


def check_learnable(dataset, field: str = "text") -> None:
    """Raises `MamaError` if a dataset has no column that supervised training reads."""
    columns = dataset.column_names
    if columns and not {field, "messages", "conversations", "prompt", "question", "input_ids"} & set(columns):
        raise MamaError(
            f"the dataset has no column `{field}`, `messages` or `prompt`, only {', '.join(columns)}: rename one."
        )


def _check_template(template: str, columns: list[str]) -> None:
    """Raises `MamaError` unless `template` is text with plain `{column}` in it: no attributes, indices or widths."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        parts, plain, found = [], False, str(error)
    else:
        named = [part for part in parts if part[1] is not None]
        plain = all(part[1] in columns and not part[2] and part[3] is None for part in named)
        found = ", ".join(f"{{{part[1]}}}" for part in named)
    if not plain:
        raise MamaError(
            f"`prompt_template` does not fit the columns {', '.join(columns)} ({found}): write {{column}}, and "
            "{{ for a literal brace."
        )


def with_prompts(dataset, template: Optional[str], chat: bool, completions: bool):
    """A dataset with `prompt` (and `completion`) columns, made from `question`/`answer` where it has these.

    Args:
        template: format string over the row's columns, such as "{question}\\nAnswer:".
        chat: one message each of user and assistant instead of plain text.
        completions: make `completion` from `answer` where it is missing (SFT); otherwise `answer` stays (GRPO).

    Raises:
        MamaError: the template names a column that is not there.
    """
    columns = list(dataset.column_names or [])
    if template:
        _check_template(template, columns)
    elif "prompt" not in columns and "question" not in columns:
        return dataset
    answer = next((name for name in ("completion", "answer") if name in columns), None) if completions else None

    def convert(row):
        prompt = template.format_map(row) if template else row.get("prompt", row.get("question"))
        plain = isinstance(prompt, str)
        new = {"prompt": [{"role": "user", "content": prompt}] if chat and plain else prompt}
        if answer is not None:
            text = row[answer]
            if chat and isinstance(text, str):
                text = [{"role": "assistant", "content": text}]
            elif plain and not (prompt[-1:].isspace() or text[:1].isspace()):
                text = " " + text
            new["completion"] = text
        return new

    remove = [name for name in columns if completions and name not in ("prompt", "completion")]
    return dataset.map(convert, remove_columns=remove)
