"""The model card, and what a push to the hub carries."""

import json
from pathlib import Path

from datasets import Dataset

from mama_trl import MamaCallback, MamaConfig

from ..helpers import train


def test_a_push_carries_masks_card_and_weights(make_model, tokenizer, rows, tmp_path, monkeypatch):
    """The folder as it stands when the Trainer uploads it."""
    from trl import SFTConfig, SFTTrainer

    from mama_trl.training.integrations import connect

    uploaded = {}

    class Hub:
        def upload_folder(self, folder_path, **kwargs):
            folder = Path(folder_path)
            uploaded["files"] = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
            uploaded["card"] = (folder / "README.md").read_text()

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    args = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=4, report_to=[], disable_tqdm=True,
        max_length=16, save_strategy="no", hub_model_id="someone/pruned",
    )
    data = Dataset.from_dict({"text": ["def f(x): return x + 1\n" * 4] * 8})
    trainer = SFTTrainer(
        make_model("llama"), args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer,
        callbacks=[MamaCallback(MamaConfig(sparsity=0.8, mask_start=2))],
    )
    trainer.hub_model_id = "someone/pruned"
    connect(trainer)
    assert isinstance(trainer.callback_handler.callbacks[1], MamaCallback)  # behind the Trainer's own
    trainer.train()
    trainer.evaluate()
    trainer.push_to_hub()
    assert {"model.safetensors", "mama/masks.safetensors", "mama/state.json", "README.md"} <= uploaded["files"]
    for text in ("80.0%", "eval_loss", "evaluated at step 4, sequences of 16", "## Pruning"):
        assert text in uploaded["card"]


def test_the_model_card_tells_sparsity_and_numbers(make_model, rows, tmp_path):
    trainer, mama, _ = train(make_model("llama"), rows, tmp_path, MamaConfig(sparsity=0.8, mask_start=2))
    trainer.evaluate()
    mama.on_push_begin(trainer.args, trainer.state, trainer.control)
    card = (tmp_path / "mama" / "README.md").read_text()
    assert "80.0%" in card and "eval_loss" in card
    assert json.loads((tmp_path / "mama" / "state.json").read_text())["config"]["sparsity"] == 0.8
    trainer.save_model(str(tmp_path))
    assert "sparsity" not in (tmp_path / "config.json").read_text()
