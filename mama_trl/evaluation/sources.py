"""Data files, folders of them and datasets names: the one reader of all commands.

What `datasets` knows it reads (JSON, CSV, Parquet, folders, the hub); any other file is plain text.
"""

import codecs
import json
import os
from pathlib import Path
from typing import Any, Optional

from ..disk.paths import exists, is_dir, is_file
from ..errors import MamaError, first_line, shown

# Suffix of a file: the builder of `datasets` that reads it, and its options.
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    ".jsonl": ("json", {}), ".ndjson": ("json", {}), ".json": ("json", {}), ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}), ".parquet": ("parquet", {}),
}
KINDS = "a .txt, .jsonl, .csv or .parquet file, a folder of them, or a datasets name"
_TEXT = ".txt"
_DEEP = 500  # brackets in one line, from where on it is looked at how deep they are nested
_SAVED = ("state.json", "dataset_dict.json")  # in a folder that `save_to_disk` wrote


def check_file_name(source: str) -> None:
    """Raises `MamaError` for a name that can only be a file and is none, before it is looked up on the hub."""
    looks_local = source.startswith((".", "/", "~")) or Path(source).suffix in (_TEXT, *FORMATS)
    if not exists(source) and (looks_local or not source.isprintable() or not 0 < len(source) < 1000):
        raise MamaError(f"{source} does not exist: give {KINDS}.")


def is_plain_text(source: str | Path) -> bool:
    """Whether `source` is a file that is read as it stands, of no format that has columns."""
    return is_file(source) and Path(source).suffix.lower() not in FORMATS


def is_lines(source: str | Path) -> bool:
    """Whether `source` is a file of JSON lines, of which each line is a row."""
    return is_file(source) and Path(source).suffix.lower() in (".jsonl", ".ndjson")


def read_plain(source: str | Path) -> str:
    """A text file's content, with line feeds for all its line ends. Raises `MamaError` if it is no text."""
    path = Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise MamaError(f"{source} is not readable as UTF-8 text ({first_line(error)}): give {KINDS}.") from None
    if "\0" in text:
        raise MamaError(f"{source} is not readable as UTF-8 text, since it holds NUL characters: give {KINDS}.")
    return text


def open_data(source: str | Path, config: Optional[str] = None, streaming: bool = False) -> dict[str, Any]:
    """Datasets by split: of a file one, `train`; a plain text has a column `text` with one row a paragraph.

    Args:
        config: which configuration of a datasets name.

    Raises:
        MamaError: nothing readable is there.
    """
    if not is_file(source):
        return _from_folder_or_hub(str(source), config, streaming)
    path = Path(source).expanduser()
    if not os.access(path, os.R_OK):
        raise MamaError(f"{source} cannot be read: check its permissions.")
    if not path.stat().st_size:
        raise MamaError(f"{source} is an empty file, which holds no text: give one with data.")
    if is_plain_text(path):
        return _from_text(path, streaming)
    builder, options = FORMATS[path.suffix.lower()]
    if builder != "parquet":
        _check_utf8(path)
    if builder == "json":
        _check_json(path)
    if streaming:
        return _loaded(source, builder, data_files=str(path), streaming=True, **options)
    try:
        return _loaded(source, builder, data_files=str(path), **options)
    except MamaError:
        if builder == "json":
            _explain_json(path)  # which line, if that is it
        raise


def one_split(data: dict[str, Any], split: str, source: str | Path) -> Any:
    """The split of that name, or the only one there is. Raises `MamaError` if it is not among several."""
    if split in data:
        return data[split]
    if len(data) == 1:
        return next(iter(data.values()))
    raise MamaError(f"{source} has no split {split}, only {', '.join(map(str, data))}: give files of one split.")


def _from_text(path: Path, streaming: bool) -> dict[str, Any]:
    from datasets import Dataset

    paragraphs = [part for part in read_plain(path).split("\n\n") if part.strip()]
    if not paragraphs:
        raise MamaError(f"{path} holds no text: give {KINDS}.")
    data = Dataset.from_dict({"text": paragraphs})
    return {"train": data.to_iterable_dataset() if streaming else data}


def _from_folder_or_hub(source: str, config: Optional[str], streaming: bool) -> dict[str, Any]:
    from datasets import Dataset, load_from_disk

    if is_dir(source):
        source = str(Path(source).expanduser())
        if any((Path(source) / name).is_file() for name in _SAVED):
            try:
                found = load_from_disk(source)
            except Exception as error:
                raise MamaError(f"{source} cannot be loaded as a dataset: {first_line(error)}.") from None
            return {"train": found} if isinstance(found, Dataset) else found
    return _loaded(source, source, name=config, streaming=streaming)


def _loaded(source: str | Path, builder: str, **options) -> dict[str, Any]:
    from datasets import load_dataset

    try:
        return load_dataset(builder, **options)
    except Exception as error:  # builders raise anything, from parser errors to the hub's
        cause = error.__cause__ if type(error).__name__ == "DatasetGenerationError" and error.__cause__ else error
        raise MamaError(f"{source} cannot be loaded as a dataset ({first_line(cause)}): give {KINDS}.") from None


def check_text(value: object, where: str) -> str:
    """`value`, if a tokenizer can read it. Raises `MamaError` for null, numbers, lists and halves of characters."""
    if not isinstance(value, str):
        raise MamaError(f"{where} is {shown(value)}, no text: take the row out, or write the text in quotes.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise MamaError(f"{where} has a lone surrogate, half of a character: write the whole one, or none.") from None
    return value


def _check_utf8(path: Path) -> None:
    """Raises `MamaError` for a file that is no UTF-8, of which the readers let anything pass."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                decoder.decode(part)
        decoder.decode(b"", final=True)
    except (UnicodeDecodeError, OSError) as error:
        raise MamaError(f"{path} is not readable as UTF-8 text ({first_line(error)}): save it as UTF-8.") from None


def _check_json(path: Path) -> None:
    """Raises `MamaError` for JSON on which the reader would bring the process down: rows that are null or the like, and
    brackets that are nested as deep as no data is."""
    with open(path, "rb") as file:
        first = next((line for line in file if line.strip()), b"").lstrip(b"\xef\xbb\xbf \t\r\n")
    whole = not is_lines(path) and (first[:1] != b"{" or not _is_json(first))
    if whole:
        value = _parsed(read_plain(path), f"{path} cannot be loaded: it")
        if not all(isinstance(row, dict) for row in (value if isinstance(value, list) else [value])):
            raise MamaError(f"{path} cannot be loaded: it is {shown(value)}: write JSON objects, one a line.")
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.lstrip(b"\xef\xbb\xbf \t\r\n")
            if line and line[:1] != b"{" or line.count(b"[") + line.count(b"{") > _DEEP:
                _checked_row(line, path, number)


def _checked_row(line: str | bytes, path: Path, number: int) -> dict:
    """A line of JSON lines. Raises `MamaError` if it is no JSON object."""
    where = f"{path} cannot be loaded: line {number}"
    row = _parsed(line, where)
    if not isinstance(row, dict):
        raise MamaError(f"{where} is {shown(row)}: write one JSON object a line, with a column `text` or others.")
    return row


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _explain_json(path: Path) -> None:
    """Raises `MamaError` naming the first line that is no row, if `path` is meant to be JSON lines."""
    text = read_plain(path)
    if not is_lines(path) and not _is_json(text.lstrip().partition("\n")[0].encode()):
        return  # one document over several lines
    for number, line in enumerate(text.split("\n"), 1):  # only line feeds end one: texts may hold the others
        if not line.strip():
            continue
        for name, value in _checked_row(line, path, number).items():
            if isinstance(value, str) or name == "text":
                check_text(value, f"{path}, line {number}, `{name}`")


def _parsed(line: str | bytes, where: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MamaError(f"{where} is no JSON ({first_line(error)}).") from None
