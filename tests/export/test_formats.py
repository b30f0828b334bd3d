"""Exports are whole or not there, and lose nothing."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mama_trl import MamaError, MaskSet, load_packed, prune
from mama_trl.export.formats import FORMATS, PACKED, export


@pytest.fixture
def pruned(make_model):
    model = make_model("llama")
    return model, prune(model, method="magnitude", sparsity=0.8, progress=False)


def test_each_format_gives_the_weights_back(pruned, tmp_path):
    model, masks = pruned
    for name in FORMATS:
        folder = export(model, masks, tmp_path / name, name)
        if name == "dense":
            state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
            assert MaskSet.load(folder).digest() == masks.digest()
        else:
            state = load_packed(folder / PACKED)
        for key, value in model.state_dict().items():
            assert torch.equal(state[key], value), (name, key)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FORMATS)


def test_an_error_leaves_nothing_behind(pruned, tmp_path, monkeypatch):
    model, masks = pruned

    def full(model, masks, folder):
        (folder / "half").write_text("half")
        raise OSError("no space left")

    monkeypatch.setitem(FORMATS, "full", full)
    with pytest.raises(MamaError, match="cannot write .*free some space"):
        export(model, masks, tmp_path / "out", "full")
    assert not list(tmp_path.iterdir())


def test_what_would_be_lost_or_written_over_is_refused(pruned, tmp_path):
    model, masks = pruned
    with pytest.raises(MamaError, match="`format` is 'zip'.*dense, packed"):
        export(model, masks, tmp_path / "out", "zip")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(MamaError, match="already holds something"):
        export(model, masks, tmp_path, "packed")
    dict(model.named_parameters())[masks.names[0]].data.add_(1.0)
    with pytest.raises(MamaError, match="not zero, so an export would lose them"):
        export(model, masks, tmp_path / "out", "packed")
    assert not (tmp_path / "out").exists()
