"""Prunes a model in place, block by block, by any of the methods."""

import logging
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
from ..targets import Target, find_blocks, find_targets, stack_experts
from .magnitude import magnitude
from .mama import mama
from .resume import Unfinished
from .sparsegpt import sparsegpt
from .wanda import wanda

logger = logging.getLogger(__name__)
# A layer that sees fewer calibration tokens than this, while others see all, is an expert that was hardly asked.
FEWEST_TOKENS = 64
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
    unfinished: Optional[Unfinished] = None,
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
        targets: default `find_targets(model, experts=True)`. An expert of a mixture to which fewer than 64
            calibration tokens came is pruned by magnitude, without redistribution; which ones is logged once.
        unfinished: where each finished block is stored, and finished blocks of a killed run are taken from.

    Raises:
        MamaError: a value makes no sense, or calibration tokens are missing.
    """
    check_choice(method, METHODS, "method")
    check_choice(redistribution, REDISTRIBUTIONS, "redistribution")
    check_sparsity(sparsity)
    group = parse_pattern(pattern)
    targets = targets if targets is not None else find_targets(model, experts=True)
    if calibration is None and method != "magnitude":
        raise MamaError(f"`calibration` is missing: method {method} needs token ids (n, sequence_length).")
    masks: dict[str, Tensor] = {}
    rare: list[str] = []

    def prune_one(target: Target, gram: Optional[Gram]) -> None:
        share = (layer_sparsity or {}).get(target.name, sparsity)
        weight = target.matrix.float()
        seen_rarely = gram is not None and gram.tokens < min(FEWEST_TOKENS, calibration.numel())
        if seen_rarely:
            rare.append(target.name)
        if method == "magnitude" or seen_rarely:
            new, mask = magnitude(weight, share, group)
        elif method == "wanda":
            new, mask = wanda(weight, gram.norm, share, group)
        elif method == "sparsegpt":
            new, mask = sparsegpt(weight, gram.gram, share, group)
        else:
            new, mask = _mama(target, weight, gram, share, group, redistribution, (importance or {}).get(target.name))
        target.matrix.copy_(new)
        masks[target.name] = mask

    with torch.no_grad():
        if method == "magnitude":
            for target in targets:
                prune_one(target, None)
        else:
            bar = tqdm(total=len(find_blocks(model)), desc=f"prune ({method})", disable=not progress, unit="block")

            def visit(own: list[Target], grams: dict[str, Gram]) -> None:
                for target in own:
                    prune_one(target, grams.pop(target.name))
                if unfinished:
                    unfinished.store(own, masks)

            with bar:
                blockwise(
                    model, calibration, targets, visit, batch_size, lambda done, total: bar.update(1),
                    skip=lambda own: unfinished is not None and unfinished.restore(own, masks),
                )
    if rare:
        logger.warning(
            "%d of %d expert matrices saw fewer than %d calibration tokens and were pruned by magnitude without "
            "redistribution (%s%s): more calibration tokens would reach them.",
            len(rare), len(targets), FEWEST_TOKENS, ", ".join(rare[:5]), ", ..." if len(rare) > 5 else "",
        )
    result = MaskSet.from_masks(stack_experts(targets, masks), pattern)
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
