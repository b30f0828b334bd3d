"""Combines indicators into one score; the one place where that is done, in training and in one-shot pruning alike."""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from ..engines import ranks
from ..selection.everywhere import exact_mean
from .formulas import COMPUTED, Inputs

LEAST = 1e-6  # of a score's mean: what a relative score counts as least, so that no quotient explodes


@dataclass(frozen=True)
class Criterion:
    """By what a connection is judged: Π s_i^(share_i) over the indicators s_i, the shares of `weights` summing to 1.

    Some follow from the weight and the inputs at hand (`COMPUTED` of formulas.py); the others come from a source
    (source.py). In the score, |w| has the exponent of the shares of magnitude and activation together, ‖x‖ that of
    activation's alone.

    Args:
        weights: weight of each indicator by name, all positive.
    """

    weights: dict[str, float]

    @property
    def sourced(self) -> list[str]:
        """The indicators that a source must give."""
        return [name for name in self.weights if name not in COMPUTED]

    @property
    def shares(self) -> dict[str, float]:
        total = sum(self.weights.values())
        return {name: weight / total for name, weight in self.weights.items()}

    @property
    def input_exponent(self) -> float:
        """The exponent of ‖x‖ in the score."""
        return self.shares.get("activation", 0.0)

    def score(self, weight: Tensor, inputs: Inputs, found: dict[str, Tensor]) -> Tensor:
        """The score of each connection of a whole matrix, (out, in) fp32.

        Args:
            weight: (out, in).
            inputs: of the layer; only indicators that read them look at it.
            found: (out, in) by name of each of `sourced`.
        """
        return combine({name: self._indicator(name, weight, inputs, found) for name in self.weights}, self.weights)

    def multiplier(self, weight: Tensor, inputs: Inputs, found: dict[str, Tensor]) -> Optional[Tensor]:
        """What multiplies |w'| ‖x‖ of a weight w' that a solver still moves, so that it is judged by this criterion.

        ‖x‖^(input_exponent − 1) Π (s_i / |w|)^(share_i) over the indicators s_i beyond magnitude and activation, each
        s_i and |w| relative to its mean. Not the score itself: that belongs to the dense weight, and a solver judges
        what it has made of it.

        Returns:
            (out, in) fp32, or None for activation alone, where nothing needs to be multiplied.
        """
        result: Optional[Tensor] = None
        if self.input_exponent != 1.0:
            norm = inputs.norm
            least = norm.clamp_min(1e-12 * norm.max().clamp_min(1e-30))
            result = least.pow(self.input_exponent - 1.0).expand(weight.shape)
        others = [name for name in self.weights if name not in ("magnitude", "activation")]
        if others:
            size = _relative(weight.float().abs())
            quotients = torch.ones_like(size)
            for name in others:
                own = self._indicator(name, weight, inputs, found).float().clamp_min(0)
                quotients *= (_relative(own) / size).pow(self.shares[name])
            result = quotients if result is None else result * quotients
        return result

    @staticmethod
    def _indicator(name: str, weight: Tensor, inputs: Inputs, found: dict[str, Tensor]) -> Tensor:
        return COMPUTED[name](weight, inputs) if name in COMPUTED else found[name]


def _relative(values: Tensor) -> Tensor:
    return (values / values.mean().clamp_min(1e-38)).clamp_min(LEAST)


def combine(
    scores: dict[str, Tensor], weights: dict[str, float], numel: Optional[int] = None, group: ranks.Group = None
) -> Tensor:
    """Weighted geometric mean Π s_i^(w_i / Σ w) of scores of any shape, fp32: free of each score's scale.

    One score alone is given as it is. Among several a negative one (movement towards zero) counts as zero, and each is
    divided by its mean over the whole matrix, which only keeps powers of numbers near 1e-12 from underflowing, and is
    the same to the last bit on any number of ranks.

    Args:
        numel: connections of the whole matrix, where `scores` are what this rank of `group` owns of it.

    Raises:
        KeyError: a score is missing.
    """
    if len(weights) == 1:
        return scores[next(iter(weights))].float()
    total = sum(weights.values())
    result: Optional[Tensor] = None
    for name in weights:
        score = scores[name].float().clamp_min(0)
        mean = exact_mean(score, score.numel() if numel is None else numel, group)
        factor = (score / max(mean, 1e-38)).pow(weights[name] / total)
        result = factor if result is None else result * factor
    return result if result is not None else torch.empty(0)


def weights_and_biases(weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The paper's fixed indicator: |w|, doubled on average in the rows of a layer with biases by |b| over its mean."""
    score = weight.float().abs()
    if bias is None or not bool((bias != 0).any()):
        return score
    size = bias.detach().float().abs()
    return score * (1.0 + size / size.mean()).unsqueeze(1)
