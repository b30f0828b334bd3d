"""Sparsity as a function of the optimizer step."""

from dataclasses import dataclass
from typing import Callable

from ..errors import MamaError

# By name: the share of the target sparsity that the masks have when `done` (0 to 1) of a ramp's mask updates are made.
# Cubic after Zhu and Gupta (arXiv 1710.01878): steep at first, while there is much to spare.
RAMPS: dict[str, Callable[[float], float]] = {"cubic": lambda done: 1.0 - (1.0 - done) ** 3}


@dataclass(frozen=True)
class Schedule:
    """When masks are computed, and for which sparsity.

    Args:
        kind: `oneshot` (one mask at `start`), `hold` (existing masks stay as they are), or one of `RAMPS` (from the
            first mask at `start` to the target at `end`).
        target: final sparsity in [0, 1).
        start, end: optimizer steps; the first and the last mask update.
        interval: steps between two mask updates of a ramp.
    """

    kind: str
    target: float
    start: int
    end: int
    interval: int = 10

    def sparsity(self, step: int) -> float:
        """Sparsity that masks computed at `step` should have."""
        if self.kind == "hold" or step < self.start:
            return 0.0
        if self.kind == "oneshot" or step >= self.end:
            return self.target
        # The first mask already prunes: the ramp has (end - start) / interval + 1 updates.
        done = (step - self.start + self.interval) / (self.end - self.start + self.interval)
        return self.target * RAMPS[self.kind](done)

    def updates(self, step: int) -> bool:
        """Whether a mask is computed right after optimizer step `step` (1-based)."""
        if self.kind == "hold" or self.target == 0.0:
            return False
        if self.kind == "oneshot":
            return step == self.start
        if step < self.start or step > self.end:
            return False
        return step == self.end or (step - self.start) % self.interval == 0

    def last_until(self, step: int) -> int:
        """The last step up to `step` after which a mask is computed; 0 if there is none."""
        if self.last == 0 or step < self.start:
            return 0
        if self.kind == "oneshot" or step >= self.end:
            return self.last
        return step - (step - self.start) % self.interval

    @property
    def last(self) -> int:
        """The last step after which a mask is computed; 0 if there is none."""
        if self.kind == "hold" or self.target == 0.0:
            return 0
        return self.start if self.kind == "oneshot" else self.end

    @classmethod
    def resolve(cls, kind: str, target: float, start: float, end: float, interval: int, total_steps: int):
        """Turns fractions of `total_steps` (values below 1) into steps, from 1 on.

        Raises `MamaError` for a step after the end of the run, where masks would never be computed.
        """

        def to_step(value: float) -> int:
            return max(1, round(value * total_steps) if value < 1 else int(value))

        first = to_step(start)
        schedule = cls(kind, target, first, max(first, to_step(end)), interval)
        if schedule.last > total_steps:
            name, value = ("mask_start", start) if first > total_steps else ("mask_end", end)
            raise MamaError(
                f"`{name}` is {value:g}, after the run's last step ({total_steps}): let the run be longer, or give a "
                "fraction such as 0.1."
            )
        return schedule
