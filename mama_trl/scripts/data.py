"""Datasets of the training commands."""

import string
from typing import Optional

from ..errors import MamaError, root_of, shown
from ..evaluation.sources import KINDS, check_file_name, open_data
from .rows import check_learnable, check_rows

# Columns that tokenizers read, in every stage and where answers are learned.
_ASKED = ("text", "prompt", "question")
_ANSWERED = ("completion", "answer", "messages")


def load_data(script_args, dataset_args):
    """The datasets by split: `datasets:` of a recipe, a local file, or a datasets name.

    A .txt file has a column `text` with one row a paragraph.

    Raises:
        MamaError: nothing named, not loadable, empty, or without the training split.
    """
    from trl import get_dataset

    name, split = script_args.dataset_name, script_args.dataset_train_split
    if not name and not dataset_args.datasets:
        raise MamaError(f"`dataset_name` is missing: give {KINDS}, or `datasets:` in a recipe.")
    if dataset_args.datasets:
        try:
            data = get_dataset(dataset_args)
        except Exception as error:  # builders raise anything, from parser errors to the hub's
            raise MamaError(f"{name or '`datasets`'} cannot be loaded as a dataset: {root_of(error)}.") from None
    else:
        check_file_name(name)
        data = open_data(name, script_args.dataset_config, script_args.dataset_streaming)
    if split not in data:
        raise MamaError(f"`dataset_train_split` is {shown(split)}, but {name} has only {', '.join(map(str, data))}.")
    return data


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
    read = (*_ASKED, *(_ANSWERED if completions else ()), field)
    for part in parts:
        if part is not None and completions and not script_args.prompt_template:
            check_learnable(part, field)
    return tuple(
        None if part is None else with_prompts(
            check_rows(part, read), script_args.prompt_template, script_args.chat, completions
        )
        for part in parts
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
            if isinstance(text, str) and not (plain and not chat):
                text = [{"role": "assistant", "content": text}]
            elif plain and not (prompt[-1:].isspace() or text[:1].isspace()):
                text = " " + text
            new["completion"] = text
        return new

    remove = [name for name in columns if completions and name not in ("prompt", "completion")]
    return dataset.map(convert, remove_columns=remove)
