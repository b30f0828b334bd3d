"""The README's three snippets run as they stand."""

import re
from pathlib import Path

import pytest
from datasets import Dataset
from trl import SFTConfig

import mama_trl
from mama_trl.demo import arithmetic

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SMALL = dict(
    use_cpu=True, bf16=False, max_steps=3, per_device_train_batch_size=4, report_to=[], disable_tqdm=True,
    save_strategy="no",
)


@pytest.mark.parametrize("index,trainer", [(0, "SFTTrainer"), (1, "MamaGRPOTrainer"), (2, "MamaDistillationTrainer")])
def test_snippet(index, trainer, make_model, tokenizer, tmp_path, monkeypatch):
    """Only what the reader brings is added: model, data, and arguments small enough for a test."""
    monkeypatch.chdir(tmp_path)
    code = SNIPPETS[index]
    assert trainer in code and len(SNIPPETS) == 3
    model = make_model("llama")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    texts = Dataset.from_dict({"text": ["def f(x): return x + 1\n" * 4] * 8})
    sums = Dataset.from_list([{"prompt": p, "answer": a} for p, a in arithmetic.sums(10, 16).train])
    if index == 2:
        masks = mama_trl.prune(model, method="magnitude", sparsity=0.5, progress=False)
        model.save_pretrained(tmp_path / "model")
        masks.save(tmp_path / "model")
    space = {
        "model": str(tmp_path / "model"), "dense": make_model("llama"), "data": texts, "prompts": sums,
        "args": SFTConfig(output_dir="out", **SMALL),
        "accuracy": lambda completions, **_: [float(len(c) % 2) for c in completions],
    }
    code = re.sub(r"(Mama\w+Config\(output_dir=\"\w+\")", r"\1, **small", code)
    space["small"] = {**SMALL, **({"num_generations": 4, "max_completion_length": 4} if index == 1 else {})}
    exec(compile(code, "README.md", "exec"), space)
    mama = space["trainer"].mama if index else next(
        c for c in space["trainer"].callback_handler.callbacks if isinstance(c, mama_trl.MamaCallback)
    )
    assert mama.masks.verify(space["trainer"].model) == 0
    assert mama.sparsity == pytest.approx([0.9, 0.9, 0.5][index], abs=0.01)
