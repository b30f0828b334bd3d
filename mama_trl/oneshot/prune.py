"""Prunes a model in place, block by block, by any of the methods."""

from typing import Optional

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import redistribution as move
from ..calibration import Gram, blockwise
from ..config import REDISTRIBUTIONS, check_choice, check_sparsity, parse_pattern
from ..errors import MamaError
from ..masks import MaskSet
from ..placement import Local, Solved
from ..selection import matrix_mask
from ..targets import Target, find_targets
from .magnitude import magnitude
from .mama import mama
from .sparsegpt import sparsegpt
from .wanda import wanda

METHODS = ("magnitude", "wanda", "sparsegpt", "mama")


def prune(
    model: nn.Module,
    calibration: Optional[Tensor] = None,
    method: str = "mama",
    sparsity: float = 0.5,
    pattern: str = "unstructured",
    layer_sparsity: Optional[dict[str, float]] = None,
    redistribution: str = "least_squares",
    importance: Optional[dict[str, Tensor]] = None,
    targets: Optional[list[Target]] = None,
    batch_size: int = 8,
    progress: bool = True,
    placement: Optional[Local] = None,
) -> MaskSet:
    """Prunes `model` in place and returns its masks.

    Each block is calibrated on the outputs of the blocks before it, already pruned. Solvers work in fp32;
    weights keep their dtype.

    Args:
        calibration: token ids, int64 (n, sequence_length); not needed by magnitude.
        method: `magnitude`, `wanda`, `sparsegpt` or `mama`.
        sparsity: pruned share in [0, 1), per matrix.
        pattern: `unstructured` or N:M, which sets the sparsity.
        layer_sparsity: sparsity by parameter name; default `sparsity` for all.
        redistribution: for `mama`: least_squares, bias, mean or none.
        importance: for `mama`: (out, in) factors by parameter name on the activation score.
        targets: default `find_targets(model)`.
        placement: where the matrices lie; default in this process alone.

    Raises:
        MamaError: a value makes no sense, or calibration tokens are missing.
    """
    check_choice(method, METHODS, "method")
    check_choice(redistribution, REDISTRIBUTIONS, "redistribution")
    check_sparsity(sparsity)
    group = parse_pattern(pattern)
    targets = targets if targets is not None else find_targets(model)
    if calibration is None and method != "magnitude":
        raise MamaError(f"`calibration` is missing: method {method} needs token ids (n, sequence_length).")
    placement = placement if placement is not None else Local()

    def solve(target: Target, weight: Tensor, gram: Optional[Gram]) -> Solved:
        share = (layer_sparsity or {}).get(target.name, sparsity)
        if method == "magnitude":
            return Solved(*magnitude(weight, share, group))
        if method == "wanda":
            return Solved(*wanda(weight, gram.norm, share, group))
        if method == "sparsegpt":
            return Solved(*sparsegpt(weight, gram.gram, share, group))
        factors = factor_of[target.name]
        return _mama(weight, gram, share, group, redistribution, factors, target.bias is not None)

    factor_of: dict[str, Optional[Tensor]] = {}

    def visit(own: list[Target], grams: dict[str, Gram]) -> None:
        placement.add_up(grams)
        for target in own:
            factor_of[target.name] = (importance or {}).get(target.name)
        weights = placement.read(own)
        solved = {t.name: solve(t, weights.pop(t.name), grams.get(t.name)) for t in own if t.name in weights}
        placement.write(own, solved)
        factor_of.clear()

    with torch.no_grad():
        if method == "magnitude":
            for target in targets:
                visit([target], {})
        else:
            with tqdm(desc=f"prune ({method})", disable=not progress, unit="block") as bar:

                def on_block(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(1)

                blockwise(model, calibration, targets, visit, batch_size, on_block)
        result = placement.masks(targets, pattern)
        result.apply()
    return result


def _mama(
    weight: Tensor, gram: Gram, share: float, group, mode: str, importance: Optional[Tensor], has_bias: bool
) -> Solved:
    if mode == "least_squares":
        # A bias takes up the mean for free, so only the deviations from it are left to fit.
        new, mask = mama(weight, gram.centred if has_bias else gram.gram, share, group, importance)
    else:
        score = weight.abs() * gram.norm
        mask = matrix_mask(score if importance is None else score * importance, share, group)
        new = move.mean(weight, mask) if mode == "mean" else weight * mask
    # The mean output that is still missing goes into the bias; it changes no other output statistic.
    shift = move.bias_shift(weight, new, gram.mean) if mode in ("bias", "least_squares") and has_bias else None
    return Solved(new, mask, shift)
