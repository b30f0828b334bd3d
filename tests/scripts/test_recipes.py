"""Every recipe under configs/ parses and trains for 2 steps on a tiny model of its architecture, with local data."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mama_trl.cli import main
from mama_trl.masks.maskset import MaskSet
from mama_trl.pruning.prune import prune

from ..tiny_tokenizer import tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
# demo*.yaml are recipes of `mama run`, not of a training command.
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent != ROOT / "configs")
SIZES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    head_dim=8, max_position_embeddings=128,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders: dense models by architecture, pruned ones with masks beside them, and local data."""
    root = tmp_path_factory.mktemp("tiny")
    tokenizer = tiny_tokenizer()
    for name, config, kind in (("qwen3", Qwen3Config, Qwen3ForCausalLM), ("llama", LlamaConfig, LlamaForCausalLM)):
        torch.manual_seed(0)
        model = kind(config(vocab_size=len(tokenizer), tie_word_embeddings=True, **SIZES))
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        masks = prune(model, method="magnitude", sparsity=0.5, progress=False)
        model.save_pretrained(root / f"{name}-pruned")
        tokenizer.save_pretrained(root / f"{name}-pruned")
        masks.save(root / f"{name}-pruned")
    rows = [
        {"question": f"{a} and {b}?", "answer": f"It makes {a + b} #### {a + b}", "text": f"{a} plus {b} makes {a + b}"}
        for a in range(8) for b in range(8)
    ]
    for name, columns in (("task", ("question", "answer")), ("text", ("text",))):
        lines = [json.dumps({column: row[column] for column in columns}) for row in rows]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_there_are_recipes_for_both_models():
    assert {path.parent.name for path in RECIPES} >= {"qwen3-0.6b-gsm8k", "llama-3.2-1b"}
    assert all(path.stem in ("pretrain", "sft", "grpo", "distill") for path in RECIPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_recipe_trains(path, tiny, tmp_path):
    recipe, command = yaml.safe_load(path.read_text()), path.stem
    held = recipe.get("mask_schedule") == "hold"
    architecture = "qwen3" if "qwen3" in path.parent.name else "llama"
    data = "task" if "gsm8k" in recipe["dataset_name"] else "text"
    flags = {
        "model_name_or_path": tiny / (f"{architecture}-pruned" if held else architecture),
        "dataset_name": tiny / f"{data}.jsonl",
        "output_dir": tmp_path / "out",
        "max_steps": 2, "logging_steps": 1, "use_cpu": "true", "bf16": "false", "report_to": "none",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "calibration_tokens": 256,
    }
    if command == "distill":
        flags["teacher_model_name_or_path"] = tiny / architecture
    if command == "grpo":
        flags |= {"num_generations": 2, "max_completion_length": 4}
    else:
        flags["max_length"] = 32
    arguments = [str(item) for name, value in flags.items() for item in (f"--{name}", value)]

    assert main([command, "--config", str(path), *arguments]) == 0

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    masks = MaskSet.load(tmp_path / "out")
    if recipe["sparsity"] == 0:
        assert masks is None
    else:
        assert masks.sparsity() == pytest.approx(recipe["sparsity"], abs=0.01)
        assert masks.verify(model) == 0
    if held:
        assert masks.digest() == MaskSet.load(tiny / f"{architecture}-pruned").digest()
