"""Text from files."""

import pytest

from mama_trl import MamaError
from mama_trl.evaluation.text import blocks, read_text


@pytest.mark.parametrize(
    "name,content,word",
    [("empty.txt", b"", "no text"), ("bad.txt", b"\xff\xfe\xfa", "UTF-8"), ("bad.jsonl", b"{\"a\": 1}\n", "text")],
)
def test_bad_text_files_are_said(tmp_path, name, content, word):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MamaError, match=word):
        read_text(tmp_path / name)


def test_jsonl_and_short_text(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_text(tmp_path / "a.jsonl") == "one\n\ntwo"
    with pytest.raises(MamaError, match="sequence_length"):
        blocks(tokenizer, "one", 32)
