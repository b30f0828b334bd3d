import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mama_trl import MamaError
from mama_trl.masks.bits import unpack_bits
from mama_trl.selection import bracket, largest, threshold
from mama_trl.selection.everywhere import _floor_masks, exact_mean
from mama_trl.selection.largest import keep_mask, packed_masks
from mama_trl.selection.patterns import OwnedScores, nm_mask, row_mask, row_mask_of_owned
from mama_trl.selection.threshold import find_threshold, kept_count

from ..reference import global_masks

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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_row_mask_equals_a_stable_sort_of_each_row(rows, columns, data):
    values = data.draw(st.lists(VALUES, min_size=rows * columns, max_size=rows * columns))
    scores = torch.tensor(values).view(rows, columns)
    keep = data.draw(st.integers(1, columns))
    expected = torch.zeros(rows, columns, dtype=torch.bool)
    order = (scores + 0.0).argsort(dim=1, descending=True, stable=True)[:, :keep]
    expected.scatter_(1, order, True)
    found = row_mask_of_owned(OwnedScores(scores.flatten(), 0, (rows, columns)), keep)
    assert torch.equal(found.view(rows, columns), expected)
    turned = OwnedScores(scores.t().flatten(), 0, (columns, rows), transposed=True)
    assert torch.equal(row_mask_of_owned(turned, keep).view(columns, rows).t(), expected)


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


def test_exact_mean_does_not_depend_on_the_order():
    scores = torch.rand(10_007, generator=torch.Generator().manual_seed(0)) ** 8
    expected = exact_mean(scores, len(scores))
    assert exact_mean(scores[torch.randperm(len(scores))], len(scores)) == expected
    assert expected == pytest.approx(scores.double().mean().item(), rel=1e-6)


def test_keep_mask_is_exact_over_several_chunks(monkeypatch):
    for module in (largest, threshold):
        monkeypatch.setattr(module, "CHUNK", 8)
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    mask = keep_mask(scores, 333)
    assert int(mask.sum()) == 333
    assert scores[mask].min() >= scores[~mask].max()


def test_row_mask_keeps_the_same_number_in_each_row():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0], [9.0, 9.0, 9.0, 9.0]])
    expected = torch.tensor([[False, True, True, False], [True, True, False, False]])
    assert torch.equal(row_mask(scores, 0.5), expected)


def test_nm_mask_by_hand():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 5.0, 0.0]])
    expected = torch.tensor([[False, True, True, False, True, False, True, False]])
    assert torch.equal(nm_mask(scores, 2, 4), expected)


def test_global_masks_have_an_exact_total_and_a_floor():
    generator = torch.Generator().manual_seed(0)
    concentrated = torch.zeros(20, 20)
    concentrated[:2] = 100.0  # one threshold alone would leave most of this matrix empty
    scores = [torch.rand(20, 20, generator=generator), concentrated, torch.rand(10, 20, generator=generator)]
    masks = global_masks(scores, 0.8, floor=0.5)
    total = sum(score.numel() for score in scores)
    assert sum(int(mask.sum()) for mask in masks) == kept_count(total, 0.8)
    assert all(int(mask.sum()) >= int(0.5 * 0.2 * mask.numel()) for mask in masks)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_matrix_keeps_its_own_largest(data):
    """The floors of a global selection, all found at once, are what one selection for each matrix finds."""
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    values = st.sampled_from([0.0, 1e-42, 0.25, 0.5, 1.0, 7.0, 3e38, float("inf")])
    parts = [torch.tensor(data.draw(st.lists(values, min_size=size, max_size=size))) for size in sizes]
    keeps = [data.draw(st.integers(0, size)) for size in sizes]
    found = _floor_masks(parts, keeps, None)
    for part, keep, packed in zip(parts, keeps, found):
        assert torch.equal(packed, packed_masks([part], keep)[0])


def test_a_global_selection_refuses_nan():
    scores = [torch.rand(40), torch.rand(8)]
    scores[0][3] = float("nan")
    with pytest.raises(MamaError, match="NaN"):
        global_masks(scores, 0.5)
