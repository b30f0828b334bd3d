"""Prunes a model in place, block by block, by any of the methods."""

import logging
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Iterator, Optional
from weakref import finalize

import torch
from torch import Tensor, nn

from ..calibration.blockwise import blockwise, unmeasured
from ..calibration.grams import Measured
from ..calibration.measured import measured_losses
from ..calibration.output_gradients import output_gradients
from ..calibration.progress import Progress
from ..calibration.refine import Refiner
from ..calibration.source import FetchedBlocks
from ..calibration.stagewise import stagewise
from ..calibration.worth import input_worths
from ..config import ONE_SHOT_BUDGETS, RECORDED_BLEND, RECORDED_BUDGETS, PruningOptions, check_choice
from ..engines.offload import is_offloaded, readable
from ..errors import MamaError
from ..indicators.combine import Criterion
from ..indicators.source import ScoreSource, StoredScores
from ..masks.known import elsewhere, remember
from ..masks.maskset import MaskSet
from ..model.fits import check_fits
from ..model.language import check_readable
from ..model.sequences import Sequences, check_sequences, spread_evenly, tokens_in
from ..model.targets import Target, find_targets
from ..selection.allocation import BINS, allocate, matrix_histogram, shares_by_loss
from ..solvers.magnitude import magnitude
from ..solvers.methods import METHODS, Method
from ..solvers.problem import Gram, LayerProblem, Solution
from .checks import check_not_denser, check_solved_here
from .placement import DistributedPlacement, LocalPlacement

logger = logging.getLogger(__name__)
# An expert of a mixture to which the router sends fewer calibration tokens than this is pruned by magnitude.
FEWEST_TOKENS = 64
TOKENS_PER_INPUT = 16


def prune(
    model: nn.Module,
    calibration: Optional[Sequences] = None,
    method: str | Method = "mama",
    sparsity: float = PruningOptions.sparsity,
    scores: Optional[ScoreSource] = None,
    layer_sparsity: Optional[dict[str, float]] = None,
    placement: Optional[LocalPlacement] = None,
    batch_size: int = 8,
    progress: bool | Progress = True,
    **options,
) -> MaskSet:
    """Prunes `model` in place and returns its masks: with those that it has in matrices left out here.

    Each block is calibrated on the outputs of the blocks before it, already pruned. Solvers work in fp32;
    weights keep their dtype. An expert of a mixture to which fewer than 64 calibration tokens came is pruned by
    magnitude, without redistribution; which ones is logged once.

    Args:
        calibration: token ids, int64 (n, sequence_length), or 1-D tensors of any lengths; not needed by magnitude.
        method: a name in `METHODS`, or a `Method`.
        sparsity: pruned share of the prunable connections, in [0, 1).
        scores: where indicators and budgets come from that a training run recorded (see indicators/recorded.py).
        layer_sparsity: sparsity by target name, instead of an allocation by `budget`.
        placement: which matrices, and where they lie; default in this process alone.
        batch_size: calibration sequences at once.
        progress: a bar (True), nothing (False), or a `Progress` that also keeps finished blocks.
        options: the other fields of `PruningOptions`, such as `pattern="2:4"`.

    Raises:
        MamaError: a value makes no sense or would have no effect, or calibration tokens or scores are missing.
    """
    options = PruningOptions(sparsity=sparsity, **options)
    check_sequences(calibration)
    if isinstance(method, str):
        method = METHODS[check_choice(method, tuple(METHODS), "method")]
    check_readable(model, calibration)
    scores = scores if scores is not None else StoredScores()
    if placement is None:
        targets = find_targets(model, options.target_modules, options.exclude_modules, experts=True)
        placement = LocalPlacement(targets, _beside(model) if is_offloaded(model) else None)
    check_method(options, method, calibration is not None)
    check_scores(options, method, scores, layer_sparsity is not None)
    check_redistribution(options, placement.targets)
    check_fits(placement.targets, options)
    earlier = None
    if not isinstance(placement, DistributedPlacement):
        check_not_denser(placement.targets, options.sparsity, layer_sparsity)
        if options.target_modules or options.exclude_modules:
            earlier = elsewhere(model, {target.parameter_name for target in placement.targets})
    if layer_sparsity is None:
        layer_sparsity = _allocated(model, calibration, method, options, scores, placement, batch_size, bool(progress))
    if not isinstance(progress, Progress):
        progress = Progress(f"prune ({method.label})", progress)
    progress.masks = placement.found
    tokens = 0 if calibration is None else tokens_in(calibration)
    sweep = _Sweep(method, options, scores, layer_sparsity, placement, tokens)
    refiner = Refiner() if options.refine else None
    walk = _walk(model, calibration, method, placement, batch_size, progress, refiner)
    with torch.no_grad(), closing(progress), closing(walk):
        for measured in walk:
            sweep.solve(measured)
    sweep.warn_of_rare()
    result = placement.masks(options.pattern).joined(earlier)
    result.apply()
    if not isinstance(placement, DistributedPlacement):  # a training run does both itself
        check_solved_here(placement.targets, None if calibration is None else tokens)
        remember(model, result)
    return result


def check_method(options: PruningOptions, method: Method, calibration: bool) -> None:
    """Raises `MamaError` for options that this method does not take, or if it needs calibration and there is none."""
    plain = PruningOptions()
    for name in ("scope", "indicators", "redistribution", "refine"):
        if not method.tunable and getattr(options, name) != getattr(plain, name):
            raise MamaError(
                f"`{name}` is {getattr(options, name)!r}, which method {method.label} does not take: leave it out, or "
                "use method mama."
            )
    if options.scope == "global":
        raise MamaError("`scope` is 'global', which one-shot pruning has not: use matrix with a `budget`, or row.")
    reader = f"method {method.label}" if method.needs != "nothing" else f"budget {options.budget}"
    if not calibration and (method.needs != "nothing" or options.budget in ONE_SHOT_BUDGETS):
        raise MamaError(f"`calibration` is missing: {reader} measures activations: give token ids, or a text file.")


def check_scores(options: PruningOptions, method: Method, scores: ScoreSource, allocated: bool) -> None:
    """Raises `MamaError` for an indicator or (unless the sparsity is `allocated`) a budget that nobody recorded."""
    asked = [("indicators", name) for name in Criterion(options.weights).sourced]
    if not allocated and (options.budget or method.budget) in RECORDED_BUDGETS:
        asked.append(("budget", options.budget))
    for option, name in asked:
        if name not in scores.names():
            have = ["uniform", *ONE_SHOT_BUDGETS] if option == "budget" else ["activation", "magnitude"]
            raise MamaError(
                f"`{option}` has {name!r}, which no training run left beside this model: use one of "
                f"{', '.join([*have, *scores.names()])}."
            )


def check_redistribution(options: PruningOptions, targets: list[Target]) -> None:
    """Raises `MamaError` where redistribution into biases would move nothing, since no layer has one."""
    if options.redistribution == "bias" and all(target.bias_attribute is None for target in targets):
        raise MamaError("`redistribution` is 'bias', but no layer to prune has one: use least_squares, mean or none.")


def _allocated(
    model: nn.Module, calibration: Optional[Sequences], method: Method, options: PruningOptions, scores: ScoreSource,
    placement: LocalPlacement, batch_size: int, progress: bool,
) -> dict[str, float]:
    """Sparsity by target name under the options' budget."""
    budget, targets = options.budget or method.budget, placement.targets
    if budget == "uniform" or options.nm or options.sparsity == 0:
        return {target.name: options.sparsity for target in targets}
    sizes = [target.shape[0] * target.shape[1] for target in targets]
    if budget == "predicted":
        histograms = predicted_losses(model, calibration, targets, batch_size, progress)
        shares = shares_by_loss(histograms, sizes, options.sparsity, options.budget_blend)
    elif budget == "measured":
        solve = partial(_alone, method, options, scores)
        histograms = measured_losses(model, calibration, targets, options.sparsity, solve, batch_size, progress)
        blend = 1.0 if options.budget_blend is None else options.budget_blend
        shares = shares_by_loss(histograms, sizes, options.sparsity, blend, shrink=0.0)  # seen, not predicted
    else:
        blend = RECORDED_BLEND if options.budget_blend is None else options.budget_blend
        shares = allocate([scores.whole(budget, target) for target in targets], sizes, options.sparsity, blend)
    return {target.name: share for target, share in zip(targets, shares)}


def _alone(
    method: Method, options: PruningOptions, scores: ScoreSource, target: Target, inputs: Gram, sparsity: float
) -> Solution:
    """What the method makes of one matrix of the dense model."""
    sweep = _Sweep(method, options, scores, {target.name: sparsity}, LocalPlacement([target]), tokens=0)
    return method.solve(sweep._problem(target, Measured([target], {target.name: inputs})))


def predicted_losses(
    model: nn.Module, calibration: Sequences, targets: list[Target], batch_size: int = 8, progress: bool = False
) -> Tensor:
    """How many connections of each matrix have which predicted loss, int32 (matrices, bins): see `shares_by_loss`.

    The loss of taking out a connection, all others of its row refitted: w² times the mean square of the loss's gradient
    at its output times what its input is worth. A matrix whose inputs no token reached has zeros.
    """
    # What an output and an input are worth shows after a few thousand tokens.
    few = spread_evenly(calibration, -(-len(calibration) // 8))
    gradients = output_gradients(model, few, targets, progress)
    worths = input_worths(model, few, targets, batch_size, FetchedBlocks())
    found = []
    for target in targets:
        with readable(target.module):
            found.append(
                matrix_histogram(target.matrix, gradients[target.name], worths[target.name])
                if target.name in worths else torch.zeros(BINS, dtype=torch.int32)
            )
    return torch.stack(found)


def _beside(model: nn.Module) -> Path:
    """A folder for the changed blocks of an offloaded model, which lives as long as the model."""
    folder = TemporaryDirectory(prefix="mama-offload-")
    finalize(model, folder.cleanup)
    return Path(folder.name)


def _walk(
    model: nn.Module, calibration: Optional[Sequences], method: Method, placement: LocalPlacement, batch_size: int,
    progress: Progress, refiner: Optional[Refiner] = None,
) -> Iterator[Measured]:
    """The walk through the model that measures what the method needs."""
    targets = placement.targets
    if method.needs == "nothing":
        return unmeasured(model, targets, progress, placement.source)
    if method.needs in ("gram and goal", "gram and own goal"):
        few = _enough(calibration, targets)
        repair = method.needs == "gram and goal"
        return stagewise(model, few, targets, progress, batch_size, placement.source, refiner, repair)
    return blockwise(model, calibration, targets, progress, batch_size, placement.source)


@dataclass
class _Sweep:
    """Solves the layers of a model as they are measured.

    Args:
        tokens: calibration tokens in all.
    """

    method: Method
    options: PruningOptions
    scores: ScoreSource
    layer_sparsity: dict[str, float]
    placement: LocalPlacement
    tokens: int
    rare: list[str] = field(default_factory=list)
    unseen: set[str] = field(default_factory=set)

    def solve(self, measured: Measured) -> None:
        """Prunes the layers that were measured together."""
        placement, group = self.placement, measured.targets
        placement.add_up(measured)
        # All are read before the first is solved, so that ranks that share the work solve at the same time.
        problems = {target.name: self._problem(target, measured) for target in group}
        measured.grams.clear()
        measured.goals.clear()
        solved: dict[str, Solution] = {}
        for target in group:
            problem = problems.pop(target.name)
            if problem is not None:
                solved[target.name] = self.method.solve(problem) if target.name not in self.rare else Solution(
                    *magnitude(problem.weight, problem.sparsity, problem.nm)
                )
        placement.write(group, solved)

    def _problem(self, target: Target, measured: Measured) -> Optional[LayerProblem]:
        """The layer problem of a target; None if another rank solves it. Collective."""
        criterion, inputs = Criterion(self.options.weights), measured.grams.get(target.name)
        if inputs is not None and inputs.tokens < min(FEWEST_TOKENS, self.tokens):
            self.rare.append(target.name)
            if inputs.tokens == 0 and not target.of_mixture:
                self.unseen.add(target.name)
        found = {name: self.scores.whole(name, target) for name in criterion.sourced}
        read = self.placement.read(measured.targets, target)
        if read is None:
            return None
        return LayerProblem(
            *read,
            sparsity=self.layer_sparsity.get(target.name, self.options.sparsity),
            nm=self.options.nm,
            by_row=self.options.scope == "row",
            inputs=Gram.zeros(0, target.device) if inputs is None else inputs,
            goal=measured.goals.get(target.name),
            redistribution=self.options.redistribution,
            criterion=criterion,
            scores=found,
        )

    def warn_of_rare(self) -> None:
        uncalled = [name for name in self.rare if name in self.unseen]
        few = [name for name in self.rare if name not in self.unseen]
        how, all_of_them = "pruned by magnitude without redistribution", len(self.placement.targets)
        if few:
            logger.warning(
                "%d of %d matrices saw fewer than %d calibration tokens and were %s (%s): more calibration tokens "
                "would reach them.", len(few), all_of_them, FEWEST_TOKENS, how, _some(few),
            )
        if uncalled:
            logger.warning(
                "%d of %d matrices are never called as modules, since their weights are used directly, so what they "
                "read cannot be measured; they were %s (%s).", len(uncalled), all_of_them, how, _some(uncalled),
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _enough(calibration: Sequences, targets: list[Target]) -> Sequences:
    """The calibration sequences that MAMA reads: half of them, or more if that were fewer than 16 tokens per input.

    It goes through each block about five times where one-pass methods go twice, so that it costs about the same. Of a
    mixture it reads all, since each expert sees only the tokens that are sent to it.
    """
    if any(target.of_mixture for target in targets):
        return calibration
    widest = max(target.shape[1] for target in targets)
    least = -(-TOKENS_PER_INPUT * widest * len(calibration) // max(tokens_in(calibration), 1))
    return spread_evenly(calibration, max(-(-len(calibration) // 2), least))
