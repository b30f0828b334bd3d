"""How the total sparsity is shared among matrices: the allocation (the option `budget`)."""

import itertools
from typing import Optional

import torch
from torch import Tensor

from ..engines import ranks
from .threshold import find_threshold, kept_count, kept_counts


def uniform(sizes: list[int], sparsity: float) -> list[float]:
    return [sparsity] * len(sizes)


def global_densities(
    scores: list[Tensor], sparsity: float, sizes: Optional[list[int]] = None, group: ranks.Group = None
) -> list[float]:
    """Kept share of each matrix under one threshold on the scores of all.

    Args:
        scores: of each matrix, any shape, one dtype; with a `group` what this rank owns of it.
        sizes: connections of each whole matrix; default those of `scores`.
    """
    sizes = sizes if sizes is not None else [score.numel() for score in scores]
    keep = kept_count(sum(sizes), sparsity)
    if keep >= sum(sizes):
        return [1.0] * len(sizes)
    kept = kept_counts(scores, find_threshold(scores, keep, group), group)
    return [count / size for count, size in zip(kept, sizes)]


def blended(
    sizes: list[int], densities: list[float], sparsity: float, blend: float, floor: float = 0.1
) -> list[float]:
    """Sparsity per matrix: `blend` of `densities`, the rest uniform, with the exact total kept.

    Args:
        sizes: connections per matrix.
        densities: kept share per matrix, to be blended with the uniform one.
        sparsity: overall sparsity.
        blend: 0 uniform, 1 the indicator's own.
        floor: least density, as a share of the overall one, so that no layer starves.

    Returns:
        Sparsities s with Σ kept_count(size, s) equal to kept_count(Σ size, sparsity).
    """
    target = kept_count(sum(sizes), sparsity)
    overall = target / sum(sizes)
    wanted = [(1 - blend) * overall + blend * density for density in densities]
    low = [max(1, round(floor * overall * size)) for size in sizes]
    # Scale what is above the floor until the total fits; a matrix can be full.
    left, right = 0.0, max(1.0 / max(min(wanted), 1e-9), 1.0) * 2
    for _ in range(100):
        middle = (left + right) / 2
        total = sum(_count(w * middle, s, f) for w, s, f in zip(wanted, sizes, low))
        left, right = (middle, right) if total < target else (left, middle)
    counts = [_count(w * right, s, f) for w, s, f in zip(wanted, sizes, low)]
    # Rounding leaves a few too many: take them from the matrices with the most room above the floor.
    while sum(counts) > target:
        index = max(range(len(counts)), key=lambda i: (counts[i] - low[i], -i))
        counts[index] -= min(sum(counts) - target, max(1, (counts[index] - low[index]) // 4))
    while sum(counts) < target:
        index = max(range(len(counts)), key=lambda i: (sizes[i] - counts[i], -i))
        counts[index] += 1
    return [1 - count / size for count, size in zip(counts, sizes)]


def _count(density: float, size: int, floor: int) -> int:
    return max(floor, min(size, round(density * size)))


def allocate(
    scores: list[Tensor], sizes: list[int], sparsity: float, blend: float, group: ranks.Group = None
) -> list[float]:
    """Shares the sparsity among matrices: `blend` as a global threshold on the scores would, the rest uniformly.

    The number of kept connections is that of a uniform allocation.

    Args:
        scores: of each matrix, any shape, one dtype; with a `group` what this rank owns of it.
        sizes: connections of each whole matrix.
    """
    if blend == 0:
        return uniform(sizes, sparsity)
    return blended(sizes, global_densities(scores, sparsity, sizes, group), sparsity, blend)


# ---------------------------------------------------------------------- by predicted losses

BINS = 1 << 13  # of a histogram of non-negative fp32 numbers: exponent and five bits of the mantissa, 3 % apart
_PER_OCTAVE = 32
STEPS = 32  # between two measured densities
_CHUNK = 1 << 20  # connections handled at once: bounds the extra memory


def matrix_histogram(weight: Tensor, output_gradient: Tensor, input_worth: Tensor) -> Tensor:
    """How many connections of a matrix have which predicted loss w² g² d, int32 (bins,): enough to share sparsity by,
    and small enough to add up over ranks and to hold for every matrix (32 KiB).

    Args:
        weight: w, (out, in).
        output_gradient: g², the mean square of the loss's gradient at each output, (out,).
        input_worth: d, what no other input can stand in for, (in,).
    """
    rows = max(_CHUNK // weight.shape[1], 1)
    counts = torch.zeros(BINS, dtype=torch.int64, device=weight.device)
    for part, gradient in zip(weight.split(rows), output_gradient.split(rows)):
        loss = part.float().square() * gradient.unsqueeze(1) * input_worth
        counts += torch.bincount(loss.clamp_(0, 3e38).reshape(-1).view(torch.int32) >> 18, minlength=BINS)
    return counts.int()


def curve_histogram(densities: list[float], losses: list[float], size: int) -> Tensor:
    """What `matrix_histogram` gives, from the losses of a whole matrix at some densities (rising, below 1).

    Between two of them the loss is taken to fall geometrically, up to density 1, where there is none, in a straight
    line; a connection's loss is what the curve falls by where the connection is added. Connections below the lowest
    density count as ten times as dear as the dearest measured one, and a curve that rises is flattened: the more is
    kept, the less the next one is worth.
    """
    points = [*densities, 1.0]
    values = [max(loss, 1e-12) for loss in losses]
    steps = [(densities[0] * size, 0.0)]  # (connections, loss of each), from the dearest
    for place, (low, high) in enumerate(zip(points, points[1:])):
        edges = torch.linspace(low, high, STEPS + 1, dtype=torch.float64)
        part = (edges - low) / (high - low)
        last = place == len(densities) - 1
        curve = values[place] * (1 - part if last else (values[place + 1] / values[place]) ** part)
        number = (high - low) * size / STEPS
        steps += [(number, max(float(fall) / number, 0.0)) for fall in curve[:-1] - curve[1:]]
    dear = list(itertools.accumulate([loss for _, loss in reversed(steps[1:])], max))[::-1]
    counts = torch.zeros(BINS, dtype=torch.float64)
    for (number, _), loss in zip(steps, [10 * dear[0], *dear]):
        counts[int(torch.tensor(loss, dtype=torch.float32).clamp(0, 3e38).view(torch.int32)) >> 18] += number
    return counts.round().int()


def trust(sparsity: float) -> tuple[float, float]:
    """(blend, shrink) of `shares_by_loss`: the sparser, the less a prediction around the dense model is worth.

    Chosen by benchmarks/budget_trust.py on seven models of five kinds of block and a real one (docs/results/oneshot.md
    has its table), on text that no other benchmark uses.
    """
    blend = 0.7 - 0.3 * min(max((sparsity - 0.85) / 0.1, 0.0), 1.0)
    shrink = 0.25 + 0.25 * min(max((sparsity - 0.6) / 0.2, 0.0), 1.0)
    return blend, shrink


def shares_by_loss(
    histograms: Tensor, sizes: list[int], sparsity: float, blend: Optional[float] = None,
    shrink: Optional[float] = None,
) -> list[float]:
    """Sparsity of each matrix such that the predicted loss of what is pruned is least: one threshold over all.

    A prediction around the dense model is trusted only so far: each matrix's losses are moved towards the others' by
    `shrink` of the distance of their logarithmic means, and `blend` of what comes out is mixed with uniform.

    Args:
        histograms: whole numbers (matrices, bins), from `matrix_histogram`; a row of zeros = nothing is known, uniform.
        sizes: connections of each matrix.
        blend, shrink: default `trust(sparsity)`.
    """
    usual = trust(sparsity)
    blend, shrink = usual[0] if blend is None else blend, usual[1] if shrink is None else shrink
    counts = histograms.cpu()  # of many matrices large: worked on row by row, and never copied whole
    numbers = counts.sum(1)
    known = numbers > 0
    places = torch.arange(BINS, dtype=torch.float64)
    means = torch.stack([row.double() @ places for row in counts]) / numbers.clamp_min(1)
    overall = (means * known).sum() / known.sum().clamp_min(1)
    moves = ((shrink * (overall - means)).round().long() * known).tolist()
    everything = torch.zeros(BINS, dtype=torch.int64)
    for row, step in zip(counts, moves):
        everything += _moved(row, step)
    keep = (1 - sparsity) * float(everything.sum())
    above = everything.flip(0).cumsum(0).flip(0)  # how many lie in a bin or above it
    edge = max(int((above >= keep).nonzero()[-1]) if bool((above >= keep).any()) else 0, 0)
    behind = float(above[edge + 1]) if edge + 1 < BINS else 0.0
    inside = float(everything[edge])
    part = (keep - behind) / inside if inside else 0.0
    densities = []
    for row, step, number in zip(counts, moves, numbers.tolist()):
        moved = _moved(row, step)
        kept = float(moved[edge + 1 :].sum()) + part * float(moved[edge])
        densities.append(kept / number if number else 1 - sparsity)
    return blended(sizes, densities, sparsity, blend)


def _moved(counts: Tensor, step: int) -> Tensor:
    """`counts` moved up by `step` bins; what would leave the range stays in its outermost bin."""
    if step == 0:
        return counts
    result = torch.zeros_like(counts)
    places = (torch.arange(BINS) + step).clamp(0, BINS - 1)
    return result.index_add_(0, places, counts)
