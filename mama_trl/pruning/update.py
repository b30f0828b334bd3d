"""One mask update: statistics and weights in, masks and redistributed weights out. All of it is collective."""

import hashlib
import logging
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from ..config import MamaConfig, parse_indicators, parse_pattern
from ..engines import ranks
from ..engines.shard import Shard, group_of
from ..errors import MamaError, warn_once
from ..indicators.combine import combine
from ..indicators.formulas import curvature, magnitude
from ..indicators.trajectory import Trajectory
from ..masks.bits import pack_bits
from ..masks.maskset import MaskSet
from ..model.targets import Target
from ..selection.allocation import blended, global_densities, uniform
from ..selection.everywhere import exact_mean, global_packed_masks
from ..selection.largest import packed_masks
from ..selection.patterns import OwnedScores, nm_mask_of_owned, row_mask_of_owned
from ..selection.threshold import kept_count
from .placement import DistributedPlacement
from .prune import prune

logger = logging.getLogger(__name__)

@dataclass
class Update:
    """What a mask update reads.

    Args:
        model: the unwrapped model.
        shards: of the targets' weights and biases, by parameter name.
        calibration: this rank's token ids, int64 (n, sequence_length), the same n on every rank; needed by
            activation and by redistribution.
    """

    model: nn.Module
    targets: list[Target]
    shards: dict[str, Shard]
    config: MamaConfig
    trajectory: Optional[Trajectory] = None
    optimizer: Optional[object] = None
    calibration: Optional[Tensor] = None

    @property
    def owned(self) -> list[Shard]:
        return [self.shards[target.name] for target in self.targets]

    @property
    def group(self) -> ranks.Group:
        """The ranks over which the weights are spread; None where every rank holds them whole."""
        return group_of(self.owned)


def check_weights(shards: list[Shard]) -> None:
    """Raises `MamaError`, on all ranks, naming the first matrix with NaN or infinity; no mask is computed from it."""
    bad = torch.stack([(~torch.isfinite(shard.master)).any().to(shards[0].master.device) for shard in shards])
    bad = ranks.total(bad.int(), ranks.everyone())
    if bad.any():
        raise MamaError(
            f"{shards[int(bad.nonzero()[0])].name} holds NaN or infinity, so no mask is computed: go back to the last "
            "checkpoint and lower the learning rate."
        )


def raw_score(update: Update, shard: Shard, name: str) -> Optional[Tensor]:
    """An indicator of what this rank owns of a matrix, 1-D, any float dtype; None where it was not recorded.

    The reward's mean square stands for its root: their order is the same.
    """
    if name == "magnitude":
        return magnitude(shard.master)
    if name == "curvature":
        moment = shard.optimizer_state(update.optimizer, "exp_avg_sq")
        return None if moment is None else curvature(shard.master, moment)
    if update.trajectory is not None and update.trajectory.recorded(name):
        return update.trajectory.flat(name, shard.name)
    return None


def score(update: Update, shard: Shard, name: str) -> Tensor:
    """`raw_score` in fp32 with the reward as its root; what was never recorded falls back to magnitude."""
    value = raw_score(update, shard, name)
    if value is None:
        warn_once(logger, f"indicator {name} was not recorded or this optimizer keeps none: magnitude is used instead.")
        return magnitude(shard.master)
    return value.float().sqrt() if name == "reward" else value.float()


def layer_sparsities(update: Update, sparsity: float) -> dict[str, float]:
    """Sparsity per matrix under `config.budget`; uniform where its statistic is missing or N:M fixes it."""
    config, owned = update.config, update.owned
    sizes = [shard.numel for shard in owned]
    shares = uniform(sizes, sparsity)
    if config.budget != "uniform" and config.budget_blend > 0 and not parse_pattern(config.pattern) and sparsity > 0:
        scores = [raw_score(update, shard, config.budget) for shard in owned]
        if any(value is None for value in scores):
            warn_once(logger, f"budget {config.budget} was not recorded: the sparsity is shared uniformly instead.")
        else:
            densities = global_densities(scores, sparsity, sizes, update.group)
            shares = blended(sizes, densities, sparsity, config.budget_blend)
    return {shard.name: share for shard, share in zip(owned, shares)}


@torch.no_grad()
def update_masks(update: Update, sparsity: float) -> MaskSet:
    """Computes masks at `sparsity` and changes the weights in place, on every rank's shards.

    Raises:
        MamaError: a weight is NaN; calibration tokens are needed and there are none; ranks disagree.
    """
    config = update.config
    check_weights(update.owned)
    weights = parse_indicators(config.indicators)
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
            method="mama",
            sparsity=sparsity,
            pattern=config.pattern,
            layer_sparsity=shares,
            redistribution=config.redistribution,
            importance=_Factors(update, weights) if set(weights) != {"activation"} else None,
            targets=update.targets,
            progress=False,
            scope=config.scope,
            placement=DistributedPlacement(update.model, update.shards, ranks.everyone()),
        )
    else:
        masks = _select(update, weights, sparsity, shares)
        masks.enforce()
    check_agreement(masks, [sparsity, shares, sorted(weights.items()), config.scope, config.redistribution])
    return masks


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


class _Factors:
    """What multiplies the activation score of a matrix so that it becomes the weighted geometric mean of all
    indicators, (out, in) by parameter name; computed when asked for, so that one matrix at a time is gathered.

    Each indicator s enters as (s / |w|)^share.
    """

    def __init__(self, update: Update, weights: dict[str, float]):
        self._update, self._weights = update, weights
        self._targets = {target.name: target for target in update.targets}

    def get(self, name: str) -> Tensor:
        update, target = self._update, self._targets[name]
        shard = update.shards[name]
        size = self._relative(shard, magnitude(shard.master)).clamp_min(1e-12)
        result = torch.ones_like(size)
        total = sum(self._weights.values())
        for indicator, weight in self._weights.items():
            if indicator != "activation":
                own = self._relative(shard, score(update, shard, indicator).clamp_min(0))
                result *= (own.clamp_min(1e-6) / size).pow(weight / total)
        whole = torch.zeros(shard.numel, device=result.device)
        whole[shard.start : shard.start + shard.length] = result
        whole = ranks.total(whole, shard.group).to(target.device)
        return target.oriented(whole.view(shard.shape))

    @staticmethod
    def _relative(shard: Shard, values: Tensor) -> Tensor:
        return values / max(exact_mean(values, shard.numel, shard.group), 1e-38)


def _select(update: Update, weights: dict[str, float], sparsity: float, shares: dict[str, float]) -> MaskSet:
    """Masks from scores alone, without calibration: nothing larger than a rank's own part is ever held."""
    config, owned, group = update.config, update.owned, update.group
    pattern = parse_pattern(config.pattern)
    if config.scope == "global" and not pattern:
        parts = [_combined(update, shard, weights) for shard in owned]
        packed = global_packed_masks(parts, [shard.numel for shard in owned], sparsity, group=group)
    else:
        packed = []
        for target, shard in zip(update.targets, owned):
            scores, share = _combined(update, shard, weights), shares[shard.name]
            piece = OwnedScores(scores, shard.start, shard.shape, target.transposed)
            if pattern:
                packed.append(pack_bits(nm_mask_of_owned(piece, *pattern, group)))
            elif config.scope == "row":
                keep = kept_count(target.shape[1], share)
                packed.append(pack_bits(row_mask_of_owned(piece, keep, group)))
            else:
                packed += packed_masks([scores], kept_count(shard.numel, share), group)
    return MaskSet.from_shards({s.name: bits for s, bits in zip(owned, packed)}, owned, config.pattern)


def _combined(update: Update, shard: Shard, weights: dict[str, float]) -> Tensor:
    scores = {name: score(update, shard, name) for name in weights}
    means = {name: exact_mean(s.clamp_min(0), shard.numel, shard.group) for name, s in scores.items()}
    return combine(scores, weights, means)
