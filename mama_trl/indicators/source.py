"""Where indicators come from: a training run's statistics and optimizer, or tensors at hand."""

from typing import Any, Optional, Protocol

from torch import Tensor

from ..engines.shard import Shard
from ..errors import MamaError
from ..model.targets import Target
from .formulas import curvature, magnitude
from .trajectory import RULES, Trajectory


class ScoreSource(Protocol):
    """What gives indicators by name: all that `prune` knows of where they come from."""

    def names(self) -> list[str]:
        """The indicators that can be given now."""

    def whole(self, name: str, target: Target) -> Tensor:
        """The indicator of a whole matrix, (out, in), any float dtype. Collective where ranks share the matrix."""


class StoredScores:
    """Scores at hand: (out, in) by indicator, then by target name."""

    def __init__(self, found: Optional[dict[str, dict[str, Tensor]]] = None):
        self.found = found or {}

    def names(self) -> list[str]:
        return list(self.found)

    def whole(self, name: str, target: Target) -> Tensor:
        return self.found[name][target.name]


class TrainingScores:
    """What a running training knows: its trajectory's statistics, and Adam's second moments.

    Args:
        shards: of the targets' weights, by parameter name.
        optimizer: as the Trainer's events hand it over.
    """

    def __init__(self, shards: dict[str, Shard], trajectory: Optional[Trajectory] = None, optimizer: Any = None):
        self._shards, self._trajectory, self._optimizer = shards, trajectory, optimizer

    def names(self) -> list[str]:
        found = [name for name in self._trajectory.statistics if self._trajectory.recorded(name)] \
            if self._trajectory is not None else []
        first = next(iter(self._shards.values()))
        return found + (["curvature"] if self._moment(first) is not None else [])

    def raw(self, name: str, shard: Shard) -> Optional[Tensor]:
        """Numbers in the order of an indicator, of what this rank owns of a matrix, 1-D; None if there are none.

        A statistic's mean stands for its indicator (a mean square for its root), which has the same order.
        """
        if name == "magnitude":
            return magnitude(shard.master)
        if name == "curvature":
            moment = self._moment(shard)
            return None if moment is None else curvature(shard.master, moment)
        if self._trajectory is not None and self._trajectory.recorded(name):
            return self._trajectory.flat(name, shard.name)
        return None

    def owned(self, name: str, shard: Shard) -> Tensor:
        """The indicator of what this rank owns of a matrix, 1-D fp32. Raises `MamaError` if there is none."""
        value = self.raw(name, shard)
        if value is None:
            raise MamaError(
                f"`indicators` has {name!r}, of which nothing was recorded up to this mask update "
                f"(recorded: {', '.join(['magnitude', *self.names()])}): let `mask_start` be later, or name another."
            )
        return RULES[name].of_mean(value.float()) if name in RULES else value.float()

    def whole(self, name: str, target: Target) -> Tensor:
        shard = self._shards[target.parameter_name]
        return target.own(shard.whole(self.owned(name, shard)).to(target.device))

    def _moment(self, shard: Shard) -> Optional[Tensor]:
        return shard.optimizer_state(self._optimizer, "exp_avg_sq")
