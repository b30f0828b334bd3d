import pytest
import torch

from mama_trl.errors import MamaError
from mama_trl.export.packed import load_packed, save_packed
from mama_trl.masks.bits import pack_bits, unpack_bits
from mama_trl.masks.maskset import MaskSet
from mama_trl.model.targets import find_targets


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (16, 16)])
def test_bits_round_trip(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), shape), mask)
    assert pack_bits(mask).numel() == -(-mask.numel() // 8)


def some_masks(model):
    generator = torch.Generator().manual_seed(0)
    return MaskSet.from_masks(
        {t.name: torch.rand(t.parameter.shape, generator=generator) > 0.7 for t in find_targets(model)}
    )


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
