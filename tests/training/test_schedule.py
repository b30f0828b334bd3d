"""Sparsity as a function of the step."""

import pytest

from mama_trl.training.schedule import Schedule


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
