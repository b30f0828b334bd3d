"""How the sparsity is shared among matrices."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mama_trl.selection.allocation import blended, global_densities
from mama_trl.selection.threshold import kept_count


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(10, 500), st.floats(0, 1)), min_size=1, max_size=8),
    st.floats(0, 0.99),
    st.floats(0, 1),
)
def test_blended_budget_keeps_the_exact_total(matrices, sparsity, blend):
    sizes, densities = [m[0] for m in matrices], [m[1] for m in matrices]
    shares = blended(sizes, densities, sparsity, blend)
    kept = [kept_count(size, share) for size, share in zip(sizes, shares)]
    assert all(1 <= k <= size for k, size in zip(kept, sizes))
    # Each matrix keeps at least one connection, even where the total would be smaller than their number.
    assert sum(kept) == max(kept_count(sum(sizes), sparsity), len(sizes))


def test_global_densities_by_hand():
    scores = [torch.tensor([9.0, 8.0, 7.0, 1.0]), torch.tensor([6.0, 2.0, 2.0, 2.0])]
    assert global_densities(scores, 0.5) == [0.75, 0.25]
