import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mama_trl import selection

VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-42, -1e-42, 3.0e38, float("-inf"), 1 / 3])


@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=40), st.data())
def test_keep_mask_equals_a_stable_sort(values, data):
    keep = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values)
    expected = torch.zeros(len(values), dtype=torch.bool)
    expected[(scores + 0.0).argsort(descending=True, stable=True)[:keep]] = True
    assert torch.equal(selection.keep_mask(scores, keep), expected)


def test_keep_mask_is_exact_over_several_chunks(monkeypatch):
    monkeypatch.setattr(selection, "_CHUNK", 8)
    scores = torch.randn(1000, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    mask = selection.keep_mask(scores, 333)
    assert int(mask.sum()) == 333
    assert scores[mask].min() >= scores[~mask].max()


def test_row_mask_keeps_the_same_number_in_each_row():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0], [9.0, 9.0, 9.0, 9.0]])
    expected = torch.tensor([[False, True, True, False], [True, True, False, False]])
    assert torch.equal(selection.row_mask(scores, 0.5), expected)


def test_nm_mask_by_hand():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 5.0, 0.0]])
    expected = torch.tensor([[False, True, True, False, True, False, True, False]])
    assert torch.equal(selection.nm_mask(scores, 2, 4), expected)


def test_global_masks_have_an_exact_total_and_a_floor():
    generator = torch.Generator().manual_seed(0)
    concentrated = torch.zeros(20, 20)
    concentrated[:2] = 100.0  # one threshold alone would leave most of this matrix empty
    scores = [torch.rand(20, 20, generator=generator), concentrated, torch.rand(10, 20, generator=generator)]
    masks = selection.global_masks(scores, 0.8, floor=0.5)
    total = sum(score.numel() for score in scores)
    assert sum(int(mask.sum()) for mask in masks) == selection.kept_count(total, 0.8)
    assert all(int(mask.sum()) >= int(0.5 * 0.2 * mask.numel()) for mask in masks)
