"""How the sparsity is shared among matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mama_trl.selection.allocation import blended, global_densities, matrix_histogram, shares_by_loss
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


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(20, 400), st.floats(-20, 20)), min_size=1, max_size=6), st.floats(0, 0.99),
    st.floats(0, 1), st.floats(0, 1), st.integers(0, 9),
)
def test_shares_by_loss_keep_the_exact_total(matrices, sparsity, blend, shrink, seed):
    generator = torch.Generator().manual_seed(seed)
    losses = [torch.rand(size, generator=generator) * 10.0**scale for size, scale in matrices]
    counts = torch.stack([matrix_histogram(loss.sqrt().view(1, -1), torch.ones(1), torch.ones(1)) for loss in losses])
    sizes = [size for size, _ in matrices]
    shares = shares_by_loss(counts, sizes, sparsity, blend, shrink)
    kept = [kept_count(size, share) for size, share in zip(sizes, shares)]
    assert all(1 <= k <= size for k, size in zip(kept, sizes))
    assert sum(kept) == max(kept_count(sum(sizes), sparsity), len(sizes))


def test_shares_by_loss_are_those_of_one_threshold():
    """With full trust: what a contest of all connections keeps of each matrix, to a bin's width."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 40, generator=generator) * scale for scale in (1.0, 2.0, 0.5)]
    gradients, worths = torch.rand(3, 8, generator=generator), torch.rand(3, 40, generator=generator)
    counts = torch.stack([matrix_histogram(w, g, d) for w, g, d in zip(weights, gradients, worths)])
    losses = [w.square() * g.unsqueeze(1) * d for w, g, d in zip(weights, gradients, worths)]
    shares = shares_by_loss(counts, [320] * 3, 0.5, blend=1.0, shrink=0.0)
    for share, density in zip(shares, global_densities(losses, 0.5)):
        assert 1 - share == pytest.approx(density, abs=0.02)
    spread = max(shares) - min(shares)
    nearer = shares_by_loss(counts, [320] * 3, 0.5, blend=1.0, shrink=1.0)
    assert max(nearer) - min(nearer) < 0.5 * spread
    assert shares_by_loss(torch.zeros_like(counts), [320] * 3, 0.5) == pytest.approx([0.5] * 3)
