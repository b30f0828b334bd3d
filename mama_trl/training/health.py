"""Weights that are no numbers any more: a run stops before they are saved, and says what is left to go on from."""

from pathlib import Path

from ..engines import ranks
from ..engines.counts import first_not_finite
from ..engines.shard import Shard
from ..errors import MamaError
from .checkpoints import newest_whole


def check_finite(parameters: list[Shard], step: int, output_dir: str | Path) -> None:
    """Raises `MamaError` on every rank if a weight is NaN or infinite after `step`. Collective.

    The checkpoints of a run hold finite weights, since this was asked before each was saved.
    """
    bad = first_not_finite(parameters)
    if bad is None:
        return
    whole = ranks.decided(lambda: _name(newest_whole(output_dir)))
    going_on = f"resume from {whole}, whose weights are finite" if whole else "start anew, since no checkpoint is whole"
    raise MamaError(
        f"{bad} holds NaN or infinity after step {step}, and is not saved: lower the learning rate (or look at what "
        f"the loss is made of), and {going_on}."
    )


def _name(path: Path | None) -> str | None:
    return path and path.name
