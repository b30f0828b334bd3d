"""One threshold over all matrices, with a floor for each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mama_trl import MamaError
from mama_trl.selection.everywhere import _floor_masks, exact_mean
from mama_trl.selection.largest import packed_masks
from mama_trl.selection.threshold import kept_count

from ..reference import global_masks


def test_exact_mean_does_not_depend_on_the_order():
    scores = torch.rand(10_007, generator=torch.Generator().manual_seed(0)) ** 8
    expected = exact_mean(scores, len(scores))
    assert exact_mean(scores[torch.randperm(len(scores))], len(scores)) == expected
    assert expected == pytest.approx(scores.double().mean().item(), rel=1e-6)


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
