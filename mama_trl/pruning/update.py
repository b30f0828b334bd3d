"""One mask update: statistics and weights in, masks and redistributed weights out. All of it is collective."""

import hashlib
import logging
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from ..calibration.progress import Progress
from ..config import MamaConfig
from ..engines import ranks
from ..engines.shard import Shard, group_of
from ..errors import MamaError, warn_once
from ..indicators.combine import combine
from ..indicators.source import TrainingScores
from ..indicators.trajectory import Trajectory
from ..masks.bits import pack_bits
from ..masks.maskset import MaskSet
from ..model.sequences import Sequences, tokens_in
from ..model.targets import Target
from ..selection.allocation import allocate, uniform
from ..selection.everywhere import global_packed_masks
from ..selection.largest import packed_masks
from ..selection.patterns import OwnedScores, nm_mask_of_owned, row_mask_of_owned
from ..selection.threshold import kept_count
from .checks import check_solved
from .placement import DistributedPlacement
from .prune import prune

logger = logging.getLogger(__name__)


@dataclass
class Update:
    """What a mask update reads.

    Args:
        model: the unwrapped model.
        shards: of the targets' weights and biases, by parameter name.
        calibration: this rank's token ids, in any number and lengths; needed by activation and by redistribution.
    """

    model: nn.Module
    targets: list[Target]
    shards: dict[str, Shard]
    config: MamaConfig
    trajectory: Optional[Trajectory] = None
    optimizer: Optional[object] = None
    calibration: Optional[Sequences] = None

    @property
    def owned(self) -> list[Shard]:
        return [self.shards[target.name] for target in self.targets]

    @property
    def group(self) -> ranks.Group:
        """The ranks over which the weights are spread; None where every rank holds them whole."""
        return group_of(self.owned)

    @property
    def scores(self) -> TrainingScores:
        return TrainingScores({shard.name: shard for shard in self.owned}, self.trajectory, self.optimizer)


def check_weights(shards: list[Shard]) -> None:
    """Raises `MamaError`, on all ranks, naming the first matrix with NaN or infinity; no mask is computed from it."""
    bad = torch.stack([(~torch.isfinite(shard.master)).any().to(shards[0].master.device) for shard in shards])
    bad = ranks.total(bad.int(), ranks.everyone())
    if bad.any():
        raise MamaError(
            f"{shards[int(bad.nonzero()[0])].name} holds NaN or infinity, so no mask is computed: lower the learning "
            "rate, and resume from the last checkpoint, whose weights were looked at when it was saved."
        )


def check_moments(update: Update) -> None:
    """Raises `MamaError` if curvature is asked for and the optimizer, after its first step, keeps no second moments."""
    config = update.config
    for option, asked in (("indicators", list(config.weights)), ("budget", [config.allocation])):
        if "curvature" in asked and update.scores.raw("curvature", update.owned[0]) is None:
            raise MamaError(
                f"`{option}` has 'curvature', of which this optimizer keeps nothing (Adam's second moments): use an "
                "Adam optimizer, or sensitivity instead."
            )


def layer_sparsities(update: Update, sparsity: float) -> dict[str, float]:
    """Sparsity per matrix under the run's allocation; uniform, said once, where its statistic was never recorded."""
    config, owned = update.config, update.owned
    sizes = [shard.numel for shard in owned]
    shares = uniform(sizes, sparsity)
    if config.allocation != "uniform" and sparsity > 0:
        scores = [update.scores.raw(config.allocation, shard) for shard in owned]
        if any(value is None for value in scores):
            warn_once(logger, f"budget {config.allocation} was not recorded: the sparsity is shared uniformly instead.")
        else:
            shares = allocate(scores, sizes, sparsity, config.blend, update.group)
    return {shard.name: share for shard, share in zip(owned, shares)}


@torch.no_grad()
def update_masks(update: Update, sparsity: float) -> MaskSet:
    """Computes masks at `sparsity` and changes the weights in place, on every rank's shards.

    Raises:
        MamaError: a weight is NaN; calibration tokens are needed and there are none; an indicator was never recorded;
            ranks disagree.
    """
    config = update.config
    check_weights(update.owned)
    shares = layer_sparsities(update, sparsity)
    if config.needs_calibration:
        if update.calibration is None or not len(update.calibration):
            raise MamaError(
                "no calibration tokens have been seen before the first mask update: let `mask_start` be later, or set "
                "`indicators` to magnitude and `redistribution` to none."
            )
        masks = prune(
            update.model,
            update.calibration,
            scores=update.scores,
            layer_sparsity=shares,
            placement=DistributedPlacement(update.model, update.targets, update.shards, ranks.everyone()),
            progress=Progress("mask update", shown=False),
            **vars(config.pruning(sparsity)),
        )
    else:
        masks = select(update, sparsity, shares)
        masks.enforce()
    check_solved(list(update.shards.values()), None if update.calibration is None else tokens_in(update.calibration))
    check_agreement(masks, [sparsity, shares, sorted(config.weights.items()), config.scope, config.redistribution])
    return masks


def select(update: Update, sparsity: float, shares: dict[str, float]) -> MaskSet:
    """Masks from scores alone, without calibration: nothing larger than a rank's own part is ever held.

    Ties go by position in the parameter, which for GPT-2's Conv1D is not the order of (out, in) that `prune` has.
    """
    config, owned, group = update.config, update.owned, update.group
    if config.scope == "global":
        parts = [_scores(update, shard).clamp_min_(0) for shard in owned]  # as shares of a whole they have no sign
        packed = global_packed_masks(parts, [shard.numel for shard in owned], sparsity, group=group)
    else:
        packed = []
        for target, shard in zip(update.targets, owned):
            scores, share = _scores(update, shard), shares[shard.name]
            piece = OwnedScores(scores, shard.start, shard.shape, target.transposed)
            if config.nm:
                packed.append(pack_bits(nm_mask_of_owned(piece, *config.nm, group)))
            elif config.scope == "row":
                packed.append(pack_bits(row_mask_of_owned(piece, kept_count(target.shape[1], share), group)))
            else:
                packed += packed_masks([scores], kept_count(shard.numel, share), group)
    return MaskSet.from_shards({s.name: bits for s, bits in zip(owned, packed)}, owned, config.pattern)


def _scores(update: Update, shard: Shard) -> Tensor:
    """The combined score of what this rank owns of a matrix, 1-D fp32."""
    weights = update.config.weights
    return combine({name: update.scores.owned(name, shard) for name in weights}, weights, shard.numel, shard.group)


def check_agreement(masks: MaskSet, decided: list) -> None:
    """Raises `MamaError` on every rank if the ranks did not come to the same masks, or not by the same rules.

    Args:
        decided: what the masks follow from beside the scores. Where ranks share a matrix, none has all of its mask, and
            this is what could differ.
    """
    facts = [decided, masks.pattern, sorted(masks.kept.items())]
    if not masks.spread:
        facts.append(masks.digest())  # each rank holds all masks, and computed them itself
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()
    device = next(iter(masks.bits.values())).device
    if not ranks.agree(digest, ranks.everyone(), device):
        raise MamaError(
            "the ranks disagree on the masks just computed, so the run stops: give every rank the same seed, "
            "configuration and package versions, and resume from the last checkpoint."
        )
