"""Whether a dataset's rows can be read by the tokenizer and the model that are to learn from them."""

from typing import Iterable, Optional

from ..errors import MamaError, shown
from ..model.language import learned_positions


def check_rows(dataset, columns: Iterable[str]):
    """The dataset, if each of `columns` (those it has) holds texts, or lists that stand for messages.

    Of a stream nothing is known before it is read: its rows are checked as they come.

    Raises:
        MamaError: there are no rows, or one has something else, or nothing, in one of the columns.
    """
    features = getattr(dataset, "features", None)
    if features is None or not hasattr(dataset, "data"):
        return dataset.map(lambda row: _checked(row, columns)) if hasattr(dataset, "map") else dataset
    if not len(dataset):
        raise MamaError("the dataset has no rows: give one with data.")
    for name in dict.fromkeys(columns):
        if name in features:
            check_filled(dataset, name)
            _check_kind(dataset, name, features[name])
    return dataset


def check_filled(dataset, name: str) -> None:
    """Raises `MamaError` if a column has rows without a value."""
    values = dataset.data.column(name) if hasattr(dataset, "data") else None
    if values is not None and values.null_count:
        first = values.is_null().to_pylist().index(True) + 1
        raise MamaError(
            f"column `{name}` is null in {values.null_count} of {len(dataset)} rows (row {first}): take them out."
        )


def _check_kind(dataset, name: str, kind) -> None:
    import pyarrow.compute

    inner = kind[0] if isinstance(kind, list) and kind else getattr(kind, "feature", None)
    if isinstance(inner, dict) and {"role", "content"} <= set(inner) and name != "text":
        return _check_messages(dataset.data.column(name), name)
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        said = "lists that are no messages" if inner is not None else f"{getattr(kind, 'dtype', kind)}, no text"
        raise MamaError(f"column `{name}` holds {said}: write texts in quotes, or messages with role and content.")
    lengths = pyarrow.compute.utf8_length(pyarrow.compute.utf8_trim_whitespace(dataset.data.column(name)))
    if not pyarrow.compute.max(lengths).as_py():
        raise MamaError(f"column `{name}` holds nothing but empty texts: give one with data.")


def _check_messages(column, name: str) -> None:
    """Raises `MamaError` for messages that hold nothing but a role: what a template writes for them is no text."""
    import pyarrow.compute

    messages = pyarrow.compute.list_flatten(column)
    fields = [field.name for field in messages.type if field.name not in ("role", "name")]
    parts = [pyarrow.compute.struct_field(messages, field).is_valid().to_numpy() for field in fields]
    empty = len(messages) - int(sum(parts).astype(bool).sum())
    if empty:
        raise MamaError(f"column `{name}` has {empty} messages of {len(messages)} without content: take them out.")


def check_learnable(dataset, field: str = "text") -> None:
    """Raises `MamaError` if a dataset has no column that supervised training reads."""
    columns = dataset.column_names
    if columns and not {field, "messages", "conversations", "prompt", "question", "input_ids"} & set(columns):
        raise MamaError(
            f"the dataset has no column `{field}`, `messages` or `prompt`, only {', '.join(columns)}: rename one."
        )
    if columns and not {field, "messages", "conversations", "completion", "answer", "input_ids"} & set(columns):
        raise MamaError(
            f"the dataset has prompts and no column `completion` or `answer`, only {', '.join(columns)}: rename one."
        )


def _checked(row: dict, columns: Iterable[str]) -> dict:
    """A stream's row. Raises `MamaError` if it has no text where it should."""
    for name in columns:
        if name in row and not isinstance(row[name], (str, list)):
            raise MamaError(f"a row of the dataset has {shown(row[name])} as `{name}`, no text: take it out.")
    return row


def check_template(dataset, tokenizer, source: str) -> None:
    """Raises `MamaError` if the dataset holds messages and the tokenizer of `source` has no template to write them."""
    if dataset is None or getattr(tokenizer, "chat_template", None) is not None:
        return
    row = next(iter(dataset), {})
    for name in ("messages", "conversations", "prompt", "completion", "chosen"):
        if isinstance(row.get(name), list):
            raise MamaError(
                f"column `{name}` holds messages, but the tokenizer of {source} has no chat template to write them in: "
                "give texts, or set `chat_template_path`."
            )


def check_positions(trainer) -> None:
    """Raises `MamaError` if a prepared sequence is longer than the positions that the model has learned; others, such
    as rotary ones, go on beyond."""
    positions = learned_positions(trainer.model)
    data = [trainer.train_dataset, *_each(trainer.eval_dataset)] if positions is not None else []
    for part in data:
        longest = _longest(part, trainer)
        if longest is not None and longest > positions:
            name = "max_completion_length" if hasattr(trainer.args, "max_completion_length") else "max_length"
            raise MamaError(
                f"`{name}` is {getattr(trainer.args, name)}, and sequences of {longest} tokens are longer than the "
                f"model's {positions} positions: set it lower, or give shorter texts."
            )


def _each(data) -> list:
    if data is None:
        return []
    return list(data.values()) if isinstance(data, dict) else [data]


def _longest(dataset, trainer) -> Optional[int]:
    """Tokens of the longest sequence; of a stream, which is not known, what it is cut to."""
    args = trainer.args
    if not hasattr(dataset, "data"):
        return getattr(args, "max_length", None)
    if hasattr(args, "max_completion_length"):
        prompts = (_tokens(trainer.processing_class, prompt) for prompt in dataset["prompt"])
        return max(prompts, default=0) + args.max_completion_length
    columns = dataset.column_names
    if "seq_lengths" in columns:  # of the documents of a packed row, each of which has positions of its own
        return max((max(row, default=0) for row in dataset["seq_lengths"]), default=0)
    return max(map(len, dataset["input_ids"]), default=0) if "input_ids" in columns else None


def _tokens(tokenizer, prompt) -> int:
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
