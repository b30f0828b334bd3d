"""What is looked at before and after pruning: that no zero is brought back, and that numbers stay numbers."""

from typing import Optional

from torch import Tensor

from ..engines.counts import first_not_finite, some_not_finite
from ..engines.offload import readable
from ..engines.shard import Shard
from ..errors import MamaError
from ..model.targets import Target


def check_not_denser(targets: list[Target], sparsity: float, layer_sparsity: Optional[dict[str, float]]) -> None:
    """Raises `MamaError` if more of the matrices is zero already than is to be: pruning would bring weights back.

    What one connection a row can make is rounding.
    """
    sizes = [target.shape[0] * target.shape[1] for target in targets]
    asked = [(layer_sparsity or {}).get(target.name, sparsity) for target in targets]
    zeros = sum(zeros_in(target) for target in targets)
    total, rows = sum(sizes), sum(target.shape[0] for target in targets)
    there = int(zeros) / total
    wanted = sum(share * size for share, size in zip(asked, sizes)) / total
    if there > wanted + rows / total:
        raise MamaError(
            f"`sparsity` is {wanted:.4g}, but {there:.4f} of the prunable weights are zero already, and some of them "
            f"would be brought back: ask for at least {there:.2f}, or prune the dense model."
        )


def zeros_in(target: Target) -> Tensor:
    """How many of a matrix's weights are zero."""
    with readable(target.module):
        return target.matrix.numel() - target.matrix.count_nonzero()


def check_solved_here(targets: list[Target], tokens: Optional[int]) -> None:
    """`check_solved` of a model that this process holds alone, in memory or elsewhere."""
    for target in targets:
        with readable(target.module):
            values = {target.name: target.matrix}
            if target.bias is not None:
                values[f"bias of {target.name}"] = target.bias
            _refuse(some_not_finite(values), tokens)


def check_solved(shards: list[Shard], tokens: Optional[int]) -> None:
    """Raises `MamaError` on every rank if pruning has made NaN or infinity of a weight or bias. Collective.

    Args:
        tokens: calibration tokens that were read; None if none were.
    """
    _refuse(first_not_finite(shards), tokens)


def _refuse(bad: Optional[str], tokens: Optional[int]) -> None:
    if bad is not None:
        few = f"give more calibration tokens (there were {tokens})" if tokens is not None else "look at its weights"
        raise MamaError(f"pruning made NaN or infinity of {bad}, and nothing is saved: {few}.")
