"""One reader for all commands: the same documents in any form are one text, bad ones are said in one sentence."""

import csv
import json
from argparse import Namespace

import pytest
from datasets import Dataset, DatasetDict

from mama_trl.cli import main
from mama_trl.errors import MamaError
from mama_trl.evaluation.sources import open_data
from mama_trl.evaluation.text import heldout_text, read_text
from mama_trl.scripts.data import load_data

from .peers import made

# What ends a line elsewhere stands within texts here; commas, quotes and tabs too.
TEXTS = ["one, \"quoted\"\tand\u2028on", "two\u0085lines", "three\nlines\nof it", "four \u2029 'five'"]


def write(folder, kind: str, texts=TEXTS):
    """The documents in a file or folder of this kind; returns its path."""
    path = folder / f"data.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(texts), encoding="utf-8")
    elif kind in ("jsonl", "ndjson"):
        path.write_text("".join(json.dumps({"text": t, "n": 1}, ensure_ascii=False) + "\n" for t in texts), "utf-8")
    elif kind == "json":
        path.write_text(json.dumps([{"text": t} for t in texts], indent=1), "utf-8")
    elif kind in ("csv", "tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if kind == "tsv" else ",")
            writer.writerows([["n", "text"], *([i, t] for i, t in enumerate(texts))])
    elif kind == "parquet":
        Dataset.from_dict({"text": texts}).to_parquet(path)
    elif kind == "saved":
        Dataset.from_dict({"text": texts}).save_to_disk(path)
    elif kind == "folder":
        path.mkdir()
        write(path, "jsonl", texts).rename(path / "train.jsonl")
    return path


KINDS = ("txt", "jsonl", "ndjson", "json", "csv", "tsv", "parquet", "saved", "folder")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_the_same_text(kind, tmp_path):
    path = write(tmp_path, kind)
    assert read_text(path) == "\n\n".join(TEXTS)
    # Training reads the very same documents.
    arguments = Namespace(
        dataset_name=str(path), dataset_train_split="train", dataset_config=None, dataset_streaming=False
    )
    data = load_data(arguments, Namespace(datasets=None))
    assert list(data["train"]["text"]) == TEXTS


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_streams_are_the_same(kind, tmp_path):
    data = open_data(write(tmp_path, kind), streaming=True)["train"]
    assert [row["text"] for row in data] == TEXTS


def test_a_text_of_any_other_name_is_read_as_it_stands(tmp_path):
    (tmp_path / "wiki.raw").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert read_text(tmp_path / "wiki.raw") == "one\n\ntwo"
    assert list(open_data(tmp_path / "wiki.raw")["train"]["text"]) == ["one", "two"]


def test_splits(tmp_path):
    DatasetDict({
        "train": Dataset.from_dict({"text": ["learn"]}), "test": Dataset.from_dict({"text": ["measure"]}),
        "validation": Dataset.from_dict({"text": ["choose"]}),
    }).save_to_disk(tmp_path / "three")
    assert read_text(tmp_path / "three") == "learn" and heldout_text(str(tmp_path / "three")) == "measure"
    assert heldout_text(str(write(tmp_path, "csv"))) == "\n\n".join(TEXTS)  # a file has one split, whatever its name
    with pytest.raises(MamaError, match="no split other, only train, test, validation"):
        read_text(tmp_path / "three", "other")


@pytest.mark.parametrize("name, content, said", [
    ("empty.txt", b" \n\n", "holds no text"),
    ("empty.jsonl", b"", "empty file"),
    ("binary.txt", b"\xff\xfe\x00\x80", "not readable as UTF-8"),
    ("zeros.txt", b"a\0b", "NUL"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": "b"\n', "line 2 is no JSON"),
    ("list.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 is ['b']"),
    ("other.jsonl", b'{"content": "a"}\n', "no column `text`, only content"),
    ("null.jsonl", b'{"text": "a"}\n{"text": null}\n', "line 2, `text` is None"),
    ("number.csv", b"text\n1\n2\n", "row 1, `text` is 1"),
    ("other.csv", b"content\nfour\n", "no column `text`, only content"),
    ("half.jsonl", b'{"text": "\\ud800"}\n', "lone surrogate"),
    ("mixed.jsonl", b'{"text": "a"}\n{"text": 5}\n', "line 2, `text` is 5"),
    ("deep.jsonl", b'{"text": "a"}\n' + b'{"a":' * 10**5, "line 2 is no JSON"),
    ("deep.json", b"[" * 10**5, "is no JSON"),
    ("null.json", b"[null]", "is [None]"),
    ("void.jsonl", b"null\n", "line 1 is None"),
    ("latin.jsonl", '{"text": "é"}\n'.encode("latin-1"), "not readable as UTF-8"),
    ("latin.csv", "text\né\n".encode("latin-1"), "not readable as UTF-8"),
    ("no.parquet", b"text", "cannot be loaded as a dataset"),
])
def test_bad_ones_are_one_sentence(name, content, said, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MamaError) as caught:
        read_text(tmp_path / name)
    assert said in str(caught.value) and len(str(caught.value)) < 300


def test_evaluate_gives_the_same_number_for_every_kind(tmp_path, capsys):
    model, found = made.saved(tmp_path / "model"), {}
    for kind in ("txt", "jsonl", "csv", "parquet"):
        path = write(tmp_path, kind, [text * 20 for text in TEXTS])
        numbers = tmp_path / f"{kind}.json"
        assert main(["evaluate", model, "--text", str(path), "--sequence_length", "32", "--json", str(numbers)]) == 0
        found[kind] = json.loads(numbers.read_text())["perplexity"]
    assert len(set(found.values())) == 1, found
