"""Packed files lose nothing."""

import pytest
import torch

from mama_trl.errors import MamaError
from mama_trl.export.packed import load_packed, save_packed

from ..helpers import some_masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_packed_file_is_read_back_bit_for_bit(make_model, tmp_path, dtype, architecture):
    model = make_model(architecture).to(dtype)
    masks = some_masks(model)
    with pytest.raises(MamaError, match="not zero"):
        save_packed(model, masks, tmp_path / "packed.safetensors")
    masks.apply(model)
    size = save_packed(model, masks, tmp_path / "packed.safetensors")
    back = load_packed(tmp_path / "packed.safetensors")
    original = model.state_dict()
    assert back.keys() == original.keys()
    for name, value in original.items():
        assert value.dtype == back[name].dtype
        assert torch.equal(value.view(torch.uint8), back[name].view(torch.uint8)), name
    assert size < 0.75 * sum(p.numel() * p.element_size() for p in model.parameters())
