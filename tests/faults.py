"""What the tests of faults share: one sentence instead of a traceback, and nothing changed on disk."""

import hashlib
import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mama_trl.cli import TRAINING, main
from mama_trl.errors import MamaError

from .tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]

LONGEST = 300


class Reached(Exception):
    """The checks are through, and compute would begin."""


def sentence_of(error: MamaError) -> str:
    """The sentence of a refusal, which is one line that fits."""
    said = str(error)
    assert 10 < len(said) < LONGEST and said.isprintable(), said
    return said


def refused(capsys, *argv) -> str:
    """Runs `mama argv`, which must fail with exit code 2 and one sentence on stderr; returns that line."""
    assert main([str(item) for item in argv]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("mama: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    assert len(lines[0]) < LONGEST, lines[0]
    return lines[0]


def tree(folder: Path) -> dict[str, str]:
    """Everything beneath a folder: links by their targets, files by a hash of their contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@contextmanager
def unchanged(folder: Path):
    """Fails if anything beneath `folder` is another afterwards."""
    before = tree(folder)
    try:
        yield
    finally:
        after = tree(folder)
        assert after == before, sorted(set(before.items()) ^ set(after.items()))


@contextmanager
def refusal(match: str = ""):
    """Within it a `MamaError` of one sentence is raised."""
    with pytest.raises(MamaError, match=match) as caught:
        yield
    sentence_of(caught.value)


def tiny_model(folder: Path, seed: int = 0, **changes) -> Path:
    """A tiny Llama with its tokenizer, saved; `changes` of its config."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    shape = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, **changes,
    }
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def furnish(root: Path) -> Path:
    """Fills `root` with `model`, `teacher`, `train.txt`, `task.jsonl` and `work`, which holds somebody's thesis."""
    tiny_model(root / "model")
    tiny_model(root / "teacher", seed=1)
    text = "\n\n".join(f"{a} plus {b} makes {a + b}." for a in range(9) for b in range(9))
    (root / "train.txt").write_text(text)
    rows = [{"question": f"{a}+1?", "answer": f"{a + 1}"} for a in range(9)]
    (root / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "work").mkdir()
    (root / "work" / "thesis.txt").write_text("years of work")
    return root


def command_line(place: Path, command: str) -> list[str]:
    """A command over what `furnish` left that would do its work, with its output folder last."""
    model, text, out = place / "model", place / "train.txt", place / "out"
    if command in TRAINING:
        data = place / "task.jsonl" if command == "grpo" else text
        argv = [command, "--model_name_or_path", model, "--dataset_name", data, "--use_cpu", "true", "--bf16", "false",
                "--max_steps", "2", "--report_to", "none"]
        if command == "distill":
            argv += ["--teacher_model_name_or_path", place / "teacher"]
        return [str(item) for item in [*argv, "--output_dir", out]]
    return [str(item) for item in {
        "prune": ["prune", model, "--calibration", text, "--output", out],
        "evaluate": ["evaluate", model, "--text", text, "--json", place / "numbers.json"],
        "levels": ["levels", model, "--calibration", text, "--text", text, "--output", out],
        "ablation": ["ablation", model, "--calibration", text, "--text", text, "--output", out],
        "report": ["report", place / "work"],
        "run": ["run", ROOT / "configs" / "demo.yaml", "--output_dir", out],
    }[command]]
