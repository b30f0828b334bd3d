"""What is looked at before and after pruning: that no zero is brought back, and that numbers stay numbers."""

from typing import Optional

from ..engines.counts import first_not_finite
from ..engines.shard import Shard
from ..errors import MamaError
from ..model.targets import Target


def check_not_denser(targets: list[Target], sparsity: float, layer_sparsity: Optional[dict[str, float]]) -> None:
    """Raises `MamaError` if more of the matrices is zero already than is to be: pruning would bring weights back.

    What one connection a row can make is rounding.
    """
    sizes = [target.shape[0] * target.shape[1] for target in targets]
    asked = [(layer_sparsity or {}).get(target.name, sparsity) for target in targets]
    zeros = sum(target.matrix.numel() - target.matrix.count_nonzero() for target in targets)
    total, rows = sum(sizes), sum(target.shape[0] for target in targets)
    there = int(zeros) / total
    wanted = sum(share * size for share, size in zip(asked, sizes)) / total
    if there > wanted + rows / total:
        raise MamaError(
            f"`sparsity` is {wanted:.4g}, but {there:.4f} of the prunable weights are zero already, and some of them "
            f"would be brought back: ask for at least {there:.2f}, or prune the dense model."
        )


def check_solved(shards: list[Shard], tokens: Optional[int]) -> None:
    """Raises `MamaError` on every rank if pruning has made NaN or infinity of a weight or bias. Collective.

    Args:
        tokens: calibration tokens that were read; None if none were.
    """
    bad = first_not_finite(shards)
    if bad is not None:
        few = f"give more calibration tokens (there were {tokens})" if tokens is not None else "look at its weights"
        raise MamaError(f"pruning made NaN or infinity of {bad}, and nothing is saved: {few}.")
