"""The k largest, exactly: against a stable sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mama_trl import MamaError
from mama_trl.masks.bits import unpack_bits
from mama_trl.selection import bracket, largest, threshold
from mama_trl.selection.largest import keep_mask, packed_masks
from mama_trl.selection.threshold import find_threshold

VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-42, -1e-42, 3.0e38, float("-inf"), 1 / 3])


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=40), st.data())
def test_keep_mask_equals_a_stable_sort(values, data):
    keep = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[(scores + 0.0).argsort(descending=True, stable=True)[:keep]] = True
    assert torch.equal(keep_mask(scores, keep), expected)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(VALUES, max_size=12), min_size=1, max_size=5), st.data(), st.sampled_from(["f4", "bf16"]))
def test_masks_over_several_parts_equal_a_stable_sort(values, data, dtype):
    """Parts may be empty; ties go to the earlier part, then to the lower position."""
    parts = [torch.tensor(part, dtype=torch.float32 if dtype == "f4" else torch.bfloat16) for part in values]
    flat = torch.cat(parts).float() + 0.0
    keep = data.draw(st.integers(0, len(flat)))
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[flat.argsort(descending=True, stable=True)[:keep]] = True
    packed = packed_masks(parts, keep)
    found = torch.cat([unpack_bits(bits, (len(part),)) for bits, part in zip(packed, parts)])
    assert torch.equal(found, expected)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from(["normal", "positive", "rounded", "equal", "bf16"]), st.floats(0, 1),
    st.sampled_from([64, 1 << 19]),
)
def test_the_sampled_bracket_changes_nothing(seed, kind, share, chunk):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, generator=generator) for size in (30_000, 0, 17, 45_001)]
    if kind == "positive":
        parts = [part.abs() for part in parts]
    elif kind == "rounded":
        parts = [part.round(decimals=1) for part in parts]
    elif kind == "equal":
        parts = [torch.ones_like(part) for part in parts]
    elif kind == "bf16":
        parts = [part.bfloat16() for part in parts]
    keep = round(share * sum(len(part) for part in parts))
    plain = packed_masks(parts, keep)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(largest, "SAMPLED_FROM", 1000)
        patch.setattr(bracket, "_STRIDE", 3)
        patch.setattr(bracket, "_CHUNK", chunk)
        bracketed = packed_masks(parts, keep)
    assert all(torch.equal(a, b) for a, b in zip(plain, bracketed))


# What 0 times infinity gives on x86 has the sign bit set, and a NaN need not have any of the mantissa's upper bits.
@pytest.mark.parametrize("bits", [0x7FC00000, 0xFFC00000 - (1 << 32), 0x7F800001])
@pytest.mark.parametrize("size, bracketed", [(100, False), (1 << 17, True)])
def test_nan_scores_are_refused(bits, size, bracketed, monkeypatch):
    monkeypatch.setattr(largest, "SAMPLED_FROM", 1000)
    monkeypatch.setattr(bracket, "_STRIDE", 3)
    seen = []
    monkeypatch.setattr(largest, "scan", lambda *args: seen.append(bracket.scan(*args)) or seen[-1])
    scores = torch.rand(size, generator=torch.Generator().manual_seed(0))
    scores.view(torch.int32)[size // 2 + 1] = bits
    assert torch.isnan(scores).sum() == 1
    with pytest.raises(MamaError, match="NaN"):
        packed_masks([scores], size // 4)
    assert [found.nans for found in seen] == ([1] if bracketed else [])
    with pytest.raises(MamaError, match="NaN"):
        find_threshold([scores], size // 4)


def test_keep_mask_is_exact_over_several_chunks(monkeypatch):
    for module in (largest, threshold):
        monkeypatch.setattr(module, "CHUNK", 8)
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    mask = keep_mask(scores, 333)
    assert int(mask.sum()) == 333
    assert scores[mask].min() >= scores[~mask].max()
