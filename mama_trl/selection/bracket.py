"""Finds the k-th largest of many scores on a CPU in one pass: a sample says between which two values it lies.

A histogram of all scores would cost more there than two comparisons. So a sample first brackets the threshold; one pass
packs what is above the bracket, and the few scores within it are all that has to be selected from.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Optional

import numpy
import torch
from torch import Tensor

from ..engines import ranks
from ..masks.bits import bytes_for
from .keys import value_of

SAMPLED_FROM = 1 << 21  # scores below which bracketing saves nothing
_STRIDE = 127  # one line in so many is sampled; prime, so that it falls into step with no matrix
_LINE = 16  # neighbours that are sampled together, since memory hands them out together
_BINS = 1 << 12  # of the sample's histograms
_INFINITY = 0x7F800000  # its key
_CHUNK = 1 << 20  # scores compared at once: so many that threads seldom wait for each other's Python


def sampled_bracket(
    parts: list[Tensor], keep: int, size: int, group: ranks.Group
) -> Optional[tuple[float, float]]:
    """(low, high): the k-th largest most probably is >= low and < high. None if too many scores lie between.

    In numpy: torch's worker threads go on spinning for a while after each operation, just when `scan` needs the cores.
    """
    lines = [part[: part.numel() // _LINE * _LINE].view(-1, _LINE)[::_STRIDE] for part in parts]
    keys = _keys(numpy.concatenate([each.float().numpy() for each in lines]).reshape(-1))
    seen = int(ranks.total(torch.tensor(len(keys)), group))
    if not seen:
        return None
    expected = keep / size * seen
    margin = 3.5 * (expected * (1 - keep / size)) ** 0.5 + 4
    wanted = max(expected - margin, 0), min(expected + margin, seen)
    low, high, above = -(1 << 31), 1 << 31, 0
    for _ in range(2):  # the second histogram is of what lies between the ends that the first one found
        shift = max(((high - low) // _BINS - 1).bit_length(), 0)
        histogram = numpy.bincount((keys >> shift) - (low >> shift), minlength=_BINS).astype("int32")
        reached = ranks.total(torch.from_numpy(histogram), group).numpy()[::-1].cumsum(dtype="int64") + above
        first, last = numpy.searchsorted(reached, wanted).clip(max=_BINS - 1).tolist()
        above = int(reached[first - 1]) if first else above
        inside = int(reached[last]) - above
        top = low + (_BINS << shift)
        low, high = top - ((last + 1) << shift), top - (first << shift)
        keys = keys[(keys >= low) & (keys <= high - 1)]
    # Copies of too many scores would cost more memory than they save time; and the outermost bins end beyond infinity.
    if inside > seen / 50 or not -_INFINITY < low < high < _INFINITY:
        return None
    return value_of(low, torch.float32), value_of(high, torch.float32)


def _keys(scores: numpy.ndarray) -> numpy.ndarray:
    """`ordered_keys` of fp32 scores in numpy."""
    bits = scores.view("int32")
    sign = bits >> 31
    return ((bits & 0x7FFFFFFF) ^ sign) - sign


@dataclass
class Scanned:
    """What `scan` found, by part: `masks`, packed bits of what is above the bracket; `positions` (numpy int64) and
    `values` of the scores within it. `above` counts the set bits of all masks, `nans` the scores that are NaN."""

    masks: list[Tensor]
    positions: list[numpy.ndarray]
    values: list[Tensor]
    above: int
    nans: int


def scan(parts: list[Tensor], low: float, high: float) -> Scanned:
    """Compares all scores with both ends of [low, high) in one pass, on as many threads as torch uses.

    Args:
        parts: 1-D scores.
    """
    masks = [torch.empty(bytes_for(part.numel()), dtype=torch.uint8) for part in parts]
    places = [(number, begin) for number, part in enumerate(parts) for begin in range(0, part.numel(), _CHUNK)]
    threads = min(torch.get_num_threads(), max(len(places), 1))
    bounds = [len(places) * number // threads for number in range(threads + 1)]

    def stripe(number: int) -> list:
        return _scan_places(parts, masks, places[bounds[number] : bounds[number + 1]], low, high)

    with ThreadPoolExecutor(threads) as pool:  # numpy lets go of the interpreter's lock
        others = [pool.submit(stripe, number) for number in range(1, threads)]
        found = [stripe(0), *(other.result() for other in others)]
    positions: list[list] = [[numpy.empty(0, "int64")] for _ in parts]
    values: list[list] = [[numpy.empty(0, "float32")] for _ in parts]
    above = nans = 0
    for number, count, where, inside in (one for results in found for one in results):
        above += count
        nans += int(numpy.isnan(inside).sum())
        positions[number].append(where)
        values[number].append(inside)
    candidates = [torch.from_numpy(numpy.concatenate(each)).to(part.dtype) for each, part in zip(values, parts)]
    return Scanned(masks, [numpy.concatenate(each) for each in positions], candidates, above, nans)


def _scan_places(
    parts: list[Tensor], masks: list[Tensor], places: list[tuple[int, int]], low: float, high: float
) -> list:
    """(part, how many are above, positions and values within) of each chunk; its mask is written."""
    above, below = numpy.empty(_CHUNK, bool), numpy.empty(_CHUNK, bool)
    bottom, top = numpy.float32(low), numpy.float32(high)
    result = []
    for number, begin in places:
        scores = parts[number][begin : begin + _CHUNK].float().numpy()
        size, padded = len(scores), -(-len(scores) // 8) * 8
        above[size:padded], below[size:padded] = False, True
        numpy.greater_equal(scores, top, out=above[:size])
        numpy.less(scores, bottom, out=below[:size])
        upper = numpy.packbits(above[:padded], bitorder="little")
        masks[number].numpy()[begin // 8 : (begin + padded) // 8] = upper
        # Outside the bracket one comparison holds; so what lies within, and NaN, stands out, and is looked for a byte
        # at a time.
        outside = numpy.packbits(below[:padded], bitorder="little")
        numpy.bitwise_or(outside, upper, out=outside)
        bytes_ = numpy.flatnonzero(outside != 255)
        flags = numpy.flatnonzero(numpy.unpackbits(~outside[bytes_], bitorder="little").view(bool))
        inside = bytes_[flags >> 3] * 8 + (flags & 7)
        result.append((number, int(numpy.count_nonzero(above[:padded])), inside + begin, scores[inside]))
    return result
