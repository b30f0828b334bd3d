import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mama_trl.config import STATISTICS
from mama_trl.indicators.combine import combine
from mama_trl.indicators.formulas import activation, curvature, sensitivity
from mama_trl.indicators.trajectory import RULES
from mama_trl.selection.allocation import blended, global_densities
from mama_trl.selection.threshold import kept_count
from mama_trl.training.schedule import Schedule


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


def test_cubic_schedule_starts_pruning_at_once_and_ends_at_the_target():
    schedule = Schedule.resolve("cubic", 0.9, 0.1, 0.5, 10, 100)
    steps = [s for s in range(1, 101) if schedule.updates(s)]
    assert steps == [10, 20, 30, 40, 50]
    levels = [schedule.sparsity(s) for s in steps]
    assert levels == pytest.approx([0.9 * (1 - (1 - i / 5) ** 3) for i in range(1, 6)])
    assert schedule.sparsity(9) == 0.0 and schedule.sparsity(100) == 0.9


def test_oneshot_schedule_updates_once():
    schedule = Schedule.resolve("oneshot", 0.8, 3, 0.5, 10, 100)
    assert [s for s in range(1, 101) if schedule.updates(s)] == [3]


def test_indicators_by_hand():
    weight, gradient = torch.tensor([[2.0, -3.0]]), torch.tensor([[0.5, 0.5]])
    assert activation(weight, torch.tensor([10.0, 1.0])).tolist() == [[20.0, 3.0]]
    assert sensitivity(weight, gradient).tolist() == [[1.0, 1.5]]
    assert [RULES[name](weight * gradient).tolist() for name in ("sensitivity", "movement", "reward")] == [
        [[1.0, 1.5]], [[-1.0, 1.5]], [[1.0, 2.25]]
    ]
    assert set(RULES) == set(STATISTICS)
    assert curvature(weight, torch.tensor([[4.0, 1.0]])).tolist() == [[8.0, 9.0]]


def test_combination_is_a_geometric_mean_free_of_scale():
    a, b = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([9.0, 1.0, 4.0])
    both = combine({"a": a, "b": b}, {"a": 1.0, "b": 1.0})
    scaled = combine({"a": a * 1e-9, "b": b * 1e6}, {"a": 1.0, "b": 1.0})
    assert torch.allclose(both / both[0], (a * b).sqrt() / 3)
    assert torch.allclose(both, scaled)
