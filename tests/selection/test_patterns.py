"""Rows and N:M."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mama_trl.selection.patterns import OwnedScores, nm_mask, row_mask, row_mask_of_owned

from .test_largest import VALUES


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


def test_row_mask_keeps_the_same_number_in_each_row():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0], [9.0, 9.0, 9.0, 9.0]])
    expected = torch.tensor([[False, True, True, False], [True, True, False, False]])
    assert torch.equal(row_mask(scores, 0.5), expected)


def test_nm_mask_by_hand():
    scores = torch.tensor([[1.0, 4.0, 3.0, 2.0, 0.0, 0.0, 5.0, 0.0]])
    expected = torch.tensor([[False, True, True, False, True, False, True, False]])
    assert torch.equal(nm_mask(scores, 2, 4), expected)
