"""Packed bits and sets of masks."""

import pytest
import torch

from mama_trl.errors import MamaError
from mama_trl.masks.bits import pack_bits, unpack_bits
from mama_trl.masks.maskset import MaskSet

from ..helpers import some_masks


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (16, 16)])
def test_bits_round_trip(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), shape), mask)
    assert pack_bits(mask).numel() == -(-mask.numel() // 8)


def test_apply_zeroes_even_nan_and_verify_counts(make_model):
    model = make_model("gpt2")
    masks = some_masks(model)
    name = masks.names[0]
    dict(model.named_parameters())[name].data.fill_(float("nan"))
    assert masks.verify(model) > 0
    masks.apply(model)
    assert masks.verify(model) == 0


def test_masks_of_another_model_are_refused_by_name(make_model, tmp_path):
    masks = some_masks(make_model("llama"))
    masks.save(tmp_path)
    loaded = MaskSet.load(tmp_path)
    assert loaded.digest() == masks.digest()
    with pytest.raises(MamaError, match="transformer.h.0|model.layers.0.self_attn.q_proj.weight"):
        loaded.check(make_model("gpt2"), "there")
    loaded.shapes[loaded.names[0]] = (1, 1)
    with pytest.raises(MamaError, match=loaded.names[0].replace(".", r"\.")):
        loaded.check(make_model("llama"), "there")


def test_damaged_mask_file_is_said(make_model, tmp_path):
    path = some_masks(make_model("llama")).save(tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(MamaError, match="no readable mask file"):
        MaskSet.load(tmp_path)
