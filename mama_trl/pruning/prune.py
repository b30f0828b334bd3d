"""Prunes a model in place, block by block, by any of the methods."""

import logging
from typing import Optional

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration.blockwise import blockwise
from ..calibration.stages import staged
from ..config import REDISTRIBUTIONS, check_choice, check_sparsity, parse_pattern
from ..errors import MamaError
from ..indicators.calibration_gradients import sensitivity_budget
from ..masks.maskset import MaskSet
from ..model.blocks import find_blocks
from ..model.targets import Target, find_targets
from ..selection.allocation import default_blend
from ..solvers.alps import alps
from ..solvers.magnitude import magnitude
from ..solvers.problem import Goal, Gram, Solution, solve_mama
from ..solvers.sparsegpt import sparsegpt
from ..solvers.wanda import wanda
from .placement import LocalPlacement
from .resume import Unfinished

logger = logging.getLogger(__name__)
# A layer that sees fewer calibration tokens than this, while others see all, is an expert that was hardly asked.
FEWEST_TOKENS = 64
TOKENS_PER_INPUT = 16
BUDGETS = ("uniform", "sensitivity")
SCOPES = ("matrix", "row")
METHODS = ("magnitude", "wanda", "sparsegpt", "alps", "mama")


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
    budget: Optional[str] = None,
    budget_blend: Optional[float] = None,
    activation_power: float = 1.0,
    dense_goals: bool = True,
    exchanges: bool = True,
    scope: str = "matrix",
    placement: Optional[LocalPlacement] = None,
) -> MaskSet:
    """Prunes `model` in place and returns its masks.

    Each block is calibrated on the outputs of the blocks before it, already pruned. Solvers work in fp32;
    weights keep their dtype.

    Args:
        calibration: token ids, int64 (n, sequence_length); not needed by magnitude.
        method: `magnitude`, `wanda`, `sparsegpt`, `alps` or `mama`.
        sparsity: pruned share in [0, 1), per matrix.
        pattern: `unstructured` or N:M, which sets the sparsity.
        layer_sparsity: sparsity by parameter name; default `sparsity` for all.
        redistribution: for `mama`: least_squares, bias, mean or none.
        importance: for `mama`: (out, in) factors by parameter name on the activation score |w| ‖x‖.
        targets: default `find_targets(model, experts=True)`. An expert of a mixture to which fewer than 64
            calibration tokens came is pruned by magnitude, without redistribution; which ones is logged once.
        unfinished: where each finished block is stored, and finished blocks of a killed run are taken from.
        budget: how the sparsity is shared among matrices: `uniform`, or by `sensitivity`, one pass of calibration
            gradients over the dense model. Default sensitivity for `mama`, uniform for the others, as their papers do.
            `layer_sparsity` and N:M go before it.
        budget_blend: share of the sensitivity budget, the rest uniform; default `default_blend(sparsity)`.
        activation_power: for `mama`: exponent of ‖x‖ in the activation score; 0 leaves the inputs out of the indicator.
        dense_goals: for `mama` with least_squares: each layer aims at the dense model's outputs; False = at what its
            dense weight makes of the inputs it gets, as other methods do.
        exchanges: for `mama` with least_squares: exchange kept for pruned connections while that lowers the error.
        scope: for `mama`: where connections compete, within a `matrix` or within each output `row`.
        placement: where the matrices lie; default in this process alone.

    Raises:
        MamaError: a value makes no sense, or calibration tokens are missing.
    """
    budget = check_choice(budget or ("sensitivity" if method == "mama" else "uniform"), BUDGETS, "budget")
    check_choice(method, METHODS, "method")
    check_choice(redistribution, REDISTRIBUTIONS, "redistribution")
    check_choice(scope, SCOPES, "scope")
    if scope == "row" and method != "mama":
        raise MamaError(f"`scope` is 'row', which only method mama takes: leave it out for {method}.")
    check_sparsity(sparsity)
    group = parse_pattern(pattern)
    targets = targets if targets is not None else find_targets(model, experts=True)
    if calibration is None and method != "magnitude":
        raise MamaError(f"`calibration` is missing: method {method} needs token ids (n, sequence_length).")
    if calibration is None and budget != "uniform":
        raise MamaError(f"`calibration` is missing: budget {budget} needs token ids (n, sequence_length).")
    if budget == "sensitivity" and layer_sparsity is None and group is None and sparsity > 0:
        blend = default_blend(sparsity) if budget_blend is None else budget_blend
        # What a matrix is worth shows after a few thousand tokens.
        few = spread_evenly(calibration, -(-len(calibration) // 8))
        # Its backward pass keeps the activations of every layer: fewer blocks at once.
        layer_sparsity = sensitivity_budget(model, few, sparsity, blend, targets, max(batch_size // 4, 1), progress)
    placement = placement if placement is not None else LocalPlacement()
    rare: list[str] = []

    def solve(target: Target, weight: Tensor, bias: Optional[Tensor], gram: Optional[Gram], goal, factors) -> Solution:
        share = (layer_sparsity or {}).get(target.name, sparsity)
        if method == "magnitude" or target.name in rare:
            return Solution(*magnitude(weight, share, group))
        if method == "wanda":
            return Solution(*wanda(weight, gram.norm, share, group))
        if method == "sparsegpt":
            return Solution(*sparsegpt(weight, gram.gram, share, group))
        if method == "alps":
            return Solution(*alps(weight, gram.gram, share, group))
        if activation_power != 1.0:
            norm = gram.norm.clamp_min(1e-12 * gram.norm.max().clamp_min(1e-30))
            factors = norm.pow(activation_power - 1.0) * (1.0 if factors is None else factors)
            factors = factors.expand(target.shape)
        goal = goal if dense_goals else None
        by_row = scope == "row"
        return Solution(*solve_mama(weight, bias, gram, goal, share, group, redistribution, factors, exchanges, by_row))

    def note_rare(target: Target, gram: Gram) -> None:
        if gram.tokens < min(FEWEST_TOKENS, calibration.numel()):
            rare.append(target.name)

    def visit(own: list[Target], grams: dict[str, Gram], goals: Optional[dict[str, Goal]] = None) -> None:
        goals = goals or {}
        placement.add_up(grams, goals)
        for target in own if grams else []:
            note_rare(target, grams[target.name])
        # All are read before the first is solved, so that ranks that share the work solve at the same time.
        work = {}
        for target in own:
            factors = (importance or {}).get(target.name)
            found = placement.read(own, target)
            if found is not None:
                work[target.name] = (*found, grams.get(target.name), goals.get(target.name), factors)
        grams.clear()
        solved = {target.name: solve(target, *work.pop(target.name)) for target in own if target.name in work}
        placement.write(own, solved)

    with torch.no_grad():
        if method == "magnitude":
            for target in targets:
                visit([target], {})
        else:
            bar = tqdm(total=len(find_blocks(model)), desc=f"prune ({method})", disable=not progress, unit="block")

            def store(own: list[Target]) -> None:
                if unfinished:
                    unfinished.store(own, placement.found)

            def visit_block(own: list[Target], grams: dict[str, Gram]) -> None:
                visit(own, grams)
                store(own)

            def advance(done: int, total: int) -> None:
                bar.update(1)

            def restore(own: list[Target]) -> bool:
                return unfinished is not None and unfinished.restore(own, placement.found)

            with bar:
                if method == "mama":
                    few = _enough(calibration, targets)
                    skip = unfinished.holds if unfinished else None
                    staged(model, few, targets, visit, batch_size, advance, skip, restore, store, placement)
                else:
                    blockwise(model, calibration, targets, visit_block, batch_size, advance, restore)
    if rare:
        logger.warning(
            "%d of %d matrices saw fewer than %d calibration tokens and were pruned by magnitude without "
            "redistribution (%s%s): more calibration tokens would reach them.",
            len(rare), len(targets), FEWEST_TOKENS, ", ".join(rare[:5]), ", ..." if len(rare) > 5 else "",
        )
    result = placement.masks(targets, pattern)
    result.apply()
    return result


def _enough(calibration: Tensor, targets: list[Target]) -> Tensor:
    """The calibration blocks that MAMA reads: half of them, or more if that were fewer than 16 tokens per input.

    It goes through each block about five times where one-pass methods go twice, so that it costs about the same.
    """
    widest = max(target.shape[1] for target in targets)
    least = -(-TOKENS_PER_INPUT * widest // calibration.shape[1])
    return spread_evenly(calibration, max(-(-len(calibration) // 2), least))


def spread_evenly(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly from all: the first ones may be of one kind of text, the last of another."""
    if count >= len(rows):
        return rows
    return rows[torch.arange(count, device=rows.device) * len(rows) // count]
