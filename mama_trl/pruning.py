"""One mask update: statistics and weights in, masks and redistributed weights out."""

import logging
from typing import Optional

import torch
from torch import Tensor, nn

from . import budget, indicators, oneshot, selection
from .config import MamaConfig, parse_indicators, parse_pattern
from .errors import MamaError
from .masks import MaskSet
from .shards import broadcast_from_first, second_moment
from .targets import Target
from .trajectory import Trajectory

logger = logging.getLogger(__name__)
_said: set[str] = set()


def say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning(message)


def check_weights(targets: list[Target]) -> None:
    """Raises `MamaError` naming the first matrix with NaN or infinity; no mask is computed from it."""
    finite = torch.stack([torch.isfinite(target.parameter.data).all() for target in targets])
    if not finite.all():
        name = targets[int((~finite).nonzero()[0])].name
        raise MamaError(
            f"{name} holds NaN or infinity, so no mask is computed: go back to the last checkpoint and lower the "
            "learning rate."
        )


def scores(
    target: Target, names: list[str], trajectory: Optional[Trajectory], optimizer
) -> dict[str, Tensor]:
    """The named indicators of one matrix, (out, in) fp32; what was never recorded falls back to magnitude."""
    result = {}
    for name in names:
        value = None
        if name == "magnitude":
            value = indicators.magnitude(target.matrix)
        elif name == "curvature":
            moment = second_moment(optimizer, target.parameter)
            if moment is not None:
                value = indicators.curvature(target.matrix, target.oriented(moment))
        elif trajectory is not None and trajectory.recorded(name):
            value = trajectory.values[name][target.name].float()
            value = target.oriented(value.sqrt() if name == "reward" else value)
        if value is None:
            say_once(f"indicator {name} was not recorded or this optimizer keeps none: magnitude is used instead.")
            value = indicators.magnitude(target.matrix)
        result[name] = value
    return result


def layer_sparsities(
    targets: list[Target], config: MamaConfig, sparsity: float, trajectory: Optional[Trajectory], optimizer
) -> dict[str, float]:
    """Sparsity per matrix under `config.budget`; uniform where its statistic is missing or N:M fixes it."""
    sizes = [target.parameter.numel() for target in targets]
    available = config.budget == "curvature" or (trajectory is not None and trajectory.recorded(config.budget))
    if config.budget == "curvature":
        available = second_moment(optimizer, targets[0].parameter) is not None
    if config.budget == "uniform" or config.budget_blend == 0 or parse_pattern(config.pattern) or sparsity == 0:
        shares = budget.uniform(sizes, sparsity)
    elif not available:
        say_once(f"budget {config.budget} was not recorded: the sparsity is shared uniformly instead.")
        shares = budget.uniform(sizes, sparsity)
    else:
        per_matrix = [scores(t, [config.budget], trajectory, optimizer)[config.budget] for t in targets]
        densities = budget.global_densities(per_matrix, sparsity)
        shares = budget.blended(sizes, densities, sparsity, config.budget_blend)
    return {target.name: share for target, share in zip(targets, shares)}


@torch.no_grad()
def update_masks(
    model: nn.Module,
    targets: list[Target],
    config: MamaConfig,
    sparsity: float,
    calibration: Optional[Tensor],
    trajectory: Optional[Trajectory] = None,
    optimizer=None,
) -> MaskSet:
    """Computes masks at `sparsity` and changes the weights of `model` in place.

    Args:
        calibration: token ids, int64 (n, sequence_length); needed by activation and by redistribution.

    Raises:
        MamaError: a weight is NaN; or calibration tokens are needed and there are none.
    """
    check_weights(targets)
    weights = parse_indicators(config.indicators)
    shares = layer_sparsities(targets, config, sparsity, trajectory, optimizer)
    needs_inputs = "activation" in weights or config.redistribution != "none"
    if needs_inputs and calibration is None:
        raise MamaError(
            "no calibration tokens have been seen before the first mask update: let `mask_start` be later, or set "
            "`indicators` to magnitude and `redistribution` to none."
        )
    if needs_inputs and config.scope == "matrix":
        importance = {t.name: _importance(t, weights, trajectory, optimizer) for t in targets}
        masks = oneshot.prune(
            model,
            calibration,
            method="mama",
            sparsity=sparsity,
            pattern=config.pattern,
            layer_sparsity=shares,
            redistribution=config.redistribution,
            importance=None if any(value is None for value in importance.values()) else importance,
            targets=targets,
            progress=False,
        )
    else:
        names = [name for name in weights if name != "activation"] or ["magnitude"]
        combined = [
            indicators.combine(scores(t, names, trajectory, optimizer), {n: weights.get(n, 1.0) for n in names})
            for t in targets
        ]
        masks = _select(targets, combined, config, sparsity, shares)
        masks.apply(model)
    broadcast_from_first([*masks.bits.values(), *(p.data for p in model.parameters())])
    return masks


def _importance(target: Target, weights: dict[str, float], trajectory, optimizer) -> Optional[Tensor]:
    """What multiplies the activation score so that it becomes the weighted geometric mean of all indicators.

    Each indicator s enters as (s / |w|)^share; None when activation stands alone.
    """
    others = {name: weight for name, weight in weights.items() if name != "activation"}
    if not others:
        return None
    size = indicators.magnitude(target.matrix).clamp_min(1e-12)
    size = size / size.mean()
    total = sum(weights.values())
    result = torch.ones_like(size)
    for name, score in scores(target, list(others), trajectory, optimizer).items():
        score = score.clamp_min(0) / score.clamp_min(0).mean().clamp_min(1e-38)
        result *= (score.clamp_min(1e-6) / size).pow(others[name] / total)
    return result


def _select(targets, combined, config, sparsity, shares) -> MaskSet:
    group = parse_pattern(config.pattern)
    if group:
        kept = [selection.nm_mask(score, *group) for score in combined]
    elif config.scope == "row":
        kept = [selection.row_mask(score, shares[t.name]) for t, score in zip(targets, combined)]
    elif config.scope == "global":
        kept = selection.global_masks(combined, sparsity)
    else:
        kept = [
            selection.keep_mask(score, selection.kept_count(score.numel(), shares[t.name]))
            for t, score in zip(targets, combined)
        ]
    masks = {t.name: t.oriented(mask).contiguous() for t, mask in zip(targets, kept)}
    return MaskSet.from_masks(masks, config.pattern)
