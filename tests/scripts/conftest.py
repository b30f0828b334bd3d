"""A tiny model and texts in a folder, and a command that must be refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mama_trl.cli import main

from ..tiny_tokenizer import tiny_tokenizer

TEXT = "\n\n".join(f"{a} plus {b} makes {a + b}, and {b} plus {a} too." for a in range(12) for b in range(12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`model` (a tiny Llama), `train.txt`, `held.txt`, `empty.txt`, `noweights`."""
    root = tmp_path_factory.mktemp("cli")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    config.save_pretrained(root / "noweights")
    (root / "train.txt").write_text(TEXT)
    (root / "held.txt").write_text(TEXT[: len(TEXT) // 3])
    (root / "empty.txt").write_text(" \n")
    (root / "empty.jsonl").touch()
    (root / "binary.txt").write_bytes(b"\xff\xfe\x00\x80")
    return root


def refused(capsys, *argv) -> str:
    """Runs `mama argv`, which must fail with exit code 2 and one line on stderr; returns that line."""
    assert main([str(item) for item in argv]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    sentences = [line for line in err if line.startswith("mama: ")]
    assert len(sentences) == 1 and "Traceback" not in "\n".join(err)
    return sentences[0]
