"""Which masks a new run starts with: those that the model object got last, those beside the model, or (to hold) the
zeros that its weights have.

Masks are taken up only where the weights under them are zero already: others belong to other weights.
"""

import logging
from pathlib import Path
from typing import Optional

from torch import nn

from ..config import MamaConfig
from ..engines import ranks
from ..engines.counts import zeros_of
from ..engines.shard import Shard
from ..errors import MamaError
from ..masks.bits import pack_bits
from ..masks.files import FOLDER
from ..masks.known import known, taken_over
from ..masks.maskset import MaskSet

logger = logging.getLogger(__name__)
# A share of the prunable weights below which zeros are chance (or a dead unit), and nobody's pruning.
FEW = 0.01


def inherited(model: nn.Module, folder: Optional[Path], enforce: bool) -> Optional[MaskSet]:
    """The masks that a model comes with, bound to its parameters and exactly zero; None if it has none. Collective.

    Args:
        folder: where the model was loaded from.
        enforce: set to zero what is not, instead of refusing it.

    Raises:
        MamaError: weights under the masks are not zero, or the masks are of another shape.
    """
    last = known(model)
    if last is not None:
        masks, where = taken_over(last, model), "the masks that this model object got last"
    elif folder is not None:
        masks, where = MaskSet.load(folder, model, zeros=False), f"the masks in {folder / FOLDER}"
        if ranks.decided(lambda: masks is not None) != (masks is not None):
            raise MamaError(f"{folder / FOLDER} is not the same for all ranks: put the model on a disk that all see.")
    else:
        return None
    if masks is not None:
        check_zero(masks, where, enforce)
        masks.enforce()  # -0.0 becomes 0.0, in every copy
    return masks


def check_zero(masks: MaskSet, where: str, enforce: bool = False) -> None:
    """Raises `MamaError` unless every connection that `masks` prune is zero in the weights. Collective."""
    wrong = masks.verify()
    if not wrong:
        return
    pruned = sum(masks.pruned.values())
    if not enforce:
        raise MamaError(
            f"{wrong} of {pruned} connections that {where} prune are not zero, so they belong to other weights: set "
            "`enforce_masks` to true to zero them (right after merging an adapter), or `inherit_masks` to false."
        )
    _say("%d of %d connections that %s prune were not zero: they are now (`enforce_masks`).", wrong, pruned, where)


def held(masks: Optional[MaskSet], shards: list[Shard], config: MamaConfig) -> Optional[MaskSet]:
    """The masks to hold: those that were inherited, or the zeros that the weights have, where there are no masks or
    somebody has pruned the model further since they were saved. Collective.

    Args:
        masks: the inherited ones.
        shards: of the prunable weights.
    """
    if config.mask_schedule != "hold" or config.sparsity == 0:
        return masks
    found = zeros_of(shards)
    total = sum(shard.numel for shard in shards)
    before = 0
    if masks is not None:  # perhaps of a choice of matrices
        known_zeros = masks.zeros or masks.pruned
        before = sum(known_zeros.get(name, 0) for name in found)
    zeros = sum(found.values())
    if zeros - before < FEW * total:
        return masks
    bits = {shard.name: pack_bits(shard.saved != 0).to(shard.master.device) for shard in shards}
    if masks is None:
        _say(
            "the model has no masks, and %.2f%% of its prunable weights (%d of %d) are zero: these are held.",
            100 * zeros / total, zeros, total,
        )
    else:
        _say(
            "%.2f%% of the prunable weights (%d of %d) are zero, more than the masks knew (%.2f%%): all of them are "
            "held.", 100 * zeros / total, zeros, total, 100 * before / total,
        )
    return MaskSet.from_shards(bits, shards, zeros=found).joined(masks)


def warn_of_free_zeros(masks: Optional[MaskSet], matrices: list[Shard], schedule: str) -> None:
    """Says it where many weights are exactly zero under no mask: training would let them grow. Collective.

    Args:
        matrices: those in which somebody may have pruned, whether or not this run does.
        schedule: the run's `mask_schedule`.
    """
    covered = masks.pruned if masks is not None else {}
    zeros, total = zeros_of(matrices), sum(shard.numel for shard in matrices)
    free = sum(number - covered.get(name, 0) for name, number in zeros.items())
    if free >= FEW * total:
        kept = (
            "set `mask_schedule` to hold" if schedule != "hold"
            else "leave `target_modules` and `exclude_modules` out, or set `inherit_masks` to false,"
        )
        _say(
            "%.2f%% of the prunable weights (%d of %d) are exactly zero and under no mask, so training lets them grow: "
            "%s to keep them.", 100 * free / total, free, total, kept,
        )


def _say(sentence: str, *values) -> None:
    """Warns, once and not on every rank."""
    if ranks.rank(ranks.everyone()) == 0:
        logger.warning(sentence, *values)
