"""Several indicators as one score."""

from typing import Optional

import torch
from torch import Tensor


def combine(scores: dict[str, Tensor], weights: dict[str, float], means: Optional[dict[str, float]] = None) -> Tensor:
    """Weighted geometric mean: Π s_i^(w_i / Σ w). Free of each indicator's scale, so no normalisation.

    A negative score (movement away from importance) counts as zero. `means` are those of the whole matrices where
    `scores` are a part of them; they only keep powers of numbers near 1e-12 from underflowing. Raises KeyError for
    a missing score.
    """
    total = sum(weights.values())
    result: Optional[Tensor] = None
    for name, weight in weights.items():
        factor = scores[name].float().clamp_min(0)
        mean = factor.mean() if means is None else torch.as_tensor(means[name], device=factor.device)
        factor = (factor / mean.clamp_min(1e-38)).pow(weight / total)
        result = factor if result is None else result * factor
    return result if result is not None else torch.empty(0)


def factors(weight: Tensor, scores: dict[str, Tensor], weights: dict[str, float]) -> tuple[Optional[Tensor], float]:
    """`importance` and `activation_power` for `prune`, so that |w| ‖x‖^power · importance is the geometric mean.

    Π s_i^(share_i) over the indicators s_i, shares summing to 1; each score is divided by its mean first. Magnitude
    |w| and activation |w| ‖x‖ need no scores.

    Args:
        weight: (out, in).
        scores: (out, in) >= 0 by indicator, for all but magnitude and activation.
        weights: weight of each indicator.
    """
    total = sum(weights.values())
    size = weight.float().abs()
    size = (size / size.mean().clamp_min(1e-38)).clamp_min(1e-6)
    result = torch.ones_like(size)
    for name, value in weights.items():
        if name not in ("magnitude", "activation"):
            score = scores[name].float().clamp_min(0)
            score = (score / score.mean().clamp_min(1e-38)).clamp_min(1e-6)
            result *= (score / size).pow(value / total)
    plain = all(name in ("magnitude", "activation") for name in weights)
    return None if plain else result, weights.get("activation", 0.0) / total


def weights_and_biases(weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The paper's fixed indicator: |w|, doubled on average in the rows of a layer with biases by |b| over its mean."""
    score = weight.float().abs()
    if bias is None or not bool((bias != 0).any()):
        return score
    size = bias.detach().float().abs()
    return score * (1.0 + size / size.mean()).unsqueeze(1)
