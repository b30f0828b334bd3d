"""Several indicators as one: what multiplies the activation score of a matrix."""

from typing import Optional

import torch
from torch import Tensor


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
