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
    masks: dict[str, Tensor] = {}

    def prune_one(target: Target, gram: Optional[Gram]) -> None:
        share = (layer_sparsity or {}).get(target.name, sparsity)
        weight = target.matrix.float()
        if method == "magnitude":
            new, mask = magnitude(weight, share, group)
        elif method == "wanda":
            new, mask = wanda(weight, gram.norm, share, group)
        elif method == "sparsegpt":
            new, mask = sparsegpt(weight, gram.gram, share, group)
        else:
            new, mask = _mama(target, weight, gram, share, group, redistribution, (importance or {}).get(target.name))
        target.matrix.copy_(new)
        masks[target.name] = target.oriented(mask).contiguous()

    with torch.no_grad():
        if method == "magnitude":
            for target in targets:
                prune_one(target, None)
        else:
            with tqdm(desc=f"prune ({method})", disable=not progress, unit="block") as bar:

                def on_block(done: int, total: int) -> None:
                    bar.total = total
                    bar.update(1)

                blockwise(
                    model, calibration, targets,
                    lambda own, grams: [prune_one(t, grams[t.name]) for t in own],
                    batch_size, on_block,
                )
    result = MaskSet.from_masks({t.name: masks[t.name] for t in targets}, pattern)
    result.apply(model)
    return result


def _mama(target, weight, gram, share, group, mode, importance) -> tuple[Tensor, Tensor]:
    if mode == "least_squares":
        # A bias takes up the mean for free, so only the deviations from it are left to fit.
        fitted = gram.centred if target.bias is not None else gram.gram
        new, mask = mama(weight, fitted, share, group, importance)
    else:
        score = weight.abs() * gram.norm
        mask = matrix_mask(score if importance is None else score * importance, share, group)
        new = move.mean(weight, mask) if mode == "mean" else weight * mask
    if mode in ("bias", "least_squares") and target.bias is not None:
        # The mean output that is still missing goes into the bias; it changes no other output statistic.
        target.bias.data += move.bias_shift(weight, new, gram.mean).to(target.bias.dtype)
    return new, mask
