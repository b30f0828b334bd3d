"""Everything of mama_trl that the cases call, behind a few functions.

When a module moves or a signature changes, this file is adapted and nothing else of tests/digests. The words here are
the cases' own, so that they stay while the package's change: `allocation` is sparsity by matrix, `scores` are
{indicator: {matrix name: (out, in) tensor}}, and a matrix's name is its parameter's, with `[expert]` for fused experts.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mama_trl import (
    MamaCallback,
    MamaConfig,
    MamaDistillationConfig,
    MamaDistillationTrainer,
    MamaGRPOConfig,
    MamaGRPOTrainer,
    MaskSet,
    cli,
    prune,
    prune_structures,
)
from mama_trl.calibration.blockwise import blockwise
from mama_trl.calibration.progress import Progress
from mama_trl.calibration.stagewise import stagewise
from mama_trl.config import RECORDED_BUDGETS, parse_pattern
from mama_trl.engines.detect import shards_of
from mama_trl.export.packed import load_packed, save_packed
from mama_trl.indicators import formulas as indicators
from mama_trl.indicators.calibration_gradients import sensitivities
from mama_trl.indicators.combine import combine as combined
from mama_trl.indicators.combine import weights_and_biases
from mama_trl.indicators.recorded import recorded
from mama_trl.indicators.source import StoredScores
from mama_trl.indicators.trajectory import RULES, Trajectory
from mama_trl.masks.bits import unpack_bits
from mama_trl.model.targets import find_targets
from mama_trl.pruning.resume import KeptProgress, Unfinished
from mama_trl.selection import allocation
from mama_trl.selection.everywhere import exact_mean, global_packed_masks
from mama_trl.selection.largest import packed_masks
from mama_trl.selection.patterns import OwnedScores, matrix_mask, nm_mask_of_owned, row_mask_of_owned
from mama_trl.solvers import redistribution
from mama_trl.solvers.alps import alps
from mama_trl.solvers.groups import choose_structures, refit
from mama_trl.solvers.magnitude import magnitude
from mama_trl.solvers.mama import mama
from mama_trl.solvers.methods import METHODS, solve_mama
from mama_trl.solvers.problem import Gram
from mama_trl.solvers.sparsegpt import sparsegpt
from mama_trl.solvers.wanda import wanda
from mama_trl.training.schedule import Schedule

__all__ = ["load_packed", "save_packed"]


def main(argv: list[str]) -> int:
    """`mama` with the words that the cases use for budgets, and the blend that every budget had in one-shot pruning."""
    argv = [{"sensitivity": "predicted"}.get(word, word) if before == "--budget" else word
            for before, word in zip(["", *argv], argv)]
    if any(f"--budget {name}" in " ".join(argv) for name in RECORDED_BUDGETS):
        argv += ["--budget_blend", "0.6"]
    return cli.main(argv)


# ---------------------------------------------------------------------- a model's matrices and masks


def matrices(model: nn.Module) -> dict[str, Tensor]:
    """(out, in) views of the prunable matrices by name, those of fused experts too."""
    return {target.name: target.matrix for target in find_targets(model, experts=True)}


def bits(masks: MaskSet) -> dict[str, Tensor]:
    """Bool masks of whole parameters by name, in the parameter's layout."""
    return {name: masks.whole(name) for name in masks.names}


def saved_masks(folder: str | Path, model: nn.Module | None = None) -> MaskSet:
    return MaskSet.load(folder, model)


# ---------------------------------------------------------------------- without training


def oneshot(
    model: nn.Module,
    rows: Tensor | None,
    method: str = "mama",
    criterion: list[str] | None = None,
    scores: dict[str, dict[str, Tensor]] | None = None,
    goals: bool = True,
    allocation: dict[str, float] | None = None,
    blend: float | None = None,
    **options,
) -> MaskSet:
    """Prunes `model` in place; further options: sparsity, pattern, scope, redistribution, budget, batch_size.

    Args:
        criterion: indicators, as in a configuration; what training records of them is in `scores`.
        goals: whether layers aim at the dense model's outputs.
        allocation, blend: sparsity by matrix; share of the sensitivity budget.
    """
    if method == "mama" and not goals:
        method = replace(METHODS["mama"], solve=partial(solve_mama, goals=False))
    if criterion is not None:
        options["indicators"] = criterion
    # The cases' word for the predicted budget, and a blend that does not follow the defaults.
    options["budget"] = {"sensitivity": "predicted"}.get(options.get("budget"), options.get("budget"))
    if options["budget"] in RECORDED_BUDGETS and blend is None:
        blend = 0.6
    progress = options.pop("progress", False)
    return prune(
        model, rows, method, scores=StoredScores(scores), layer_sparsity=allocation, budget_blend=blend,
        progress=progress, **options,
    )


class _Killed(Exception):
    pass


class _Dying(Unfinished):
    def store(self, *args):
        super().store(*args)
        raise _Killed


def resumed_oneshot(make, rows: Tensor, folder: Path, **options) -> tuple[nn.Module, MaskSet]:
    """`oneshot` of `make()`, killed after its first block and called again from what lies in `folder`."""

    def attempt(kind: type[Unfinished]) -> tuple[nn.Module, MaskSet]:
        model, state = make(), kind(folder, {"command": "the same"})
        state.begin(model, rows)
        return model, oneshot(model, rows, progress=KeptProgress("", state, shown=False), **options)

    try:
        attempt(_Dying)
    except _Killed:
        return attempt(Unfinished)
    raise AssertionError("the first call was not killed")


def structures(model: nn.Module, rows: Tensor, kind: str, **options) -> nn.Module:
    """The smaller model; `options` are sparsity, method, redistribution and seed."""
    return prune_structures(model, rows, kind, progress=False, **options)


def left_by_training(folder: str | Path, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Scores that a training run left in the checkpoint `folder`."""
    return recorded(str(folder), model, find_targets(model, experts=True))


def allocation_of(model: nn.Module, scores: dict[str, Tensor], sparsity: float, blend: float) -> dict[str, float]:
    """Sparsity by matrix as one indicator's scores share it."""
    sizes = {target.name: target.shape[0] * target.shape[1] for target in find_targets(model, experts=True)}
    shares = allocation.allocate([scores[name] for name in sizes], list(sizes.values()), sparsity, blend)
    return dict(zip(sizes, shares))


def calibration_gradients(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """Mean |w g| by matrix over batches of calibration tokens."""
    return sensitivities(model, rows, find_targets(model, experts=True), batch_size=4)


def sensitivity_allocation(model: nn.Module, rows: Tensor, sparsity: float, blend: float) -> dict[str, float]:
    return allocation_of(model, calibration_gradients(model, rows), sparsity, blend)


def grams(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """What each matrix reads, block by block through the unchanged model."""
    found: dict[str, Tensor] = {}

    for measured in blockwise(model, rows, find_targets(model, experts=True), Progress("", shown=False), batch_size=4):
        for name, gram in measured.grams.items():
            found.update({f"gram {name}": gram.gram, f"total {name}": gram.total})
            found[f"tokens {name}"] = torch.tensor(gram.tokens)
    return found


def goals(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
    """What each matrix is to put out, where every matrix loses the smaller half of its weights when its turn comes."""
    found: dict[str, Tensor] = {}

    targets = find_targets(model, experts=True)
    with torch.no_grad():
        for measured in stagewise(model, rows, targets, Progress("", shown=False), batch_size=4):
            for target in measured.targets:
                gram, goal = measured.grams[target.name], measured.goals.get(target.name)
                found.update({f"gram {target.name}": gram.gram})
                if goal is not None:
                    found.update({f"cross {target.name}": goal.cross, f"total {target.name}": goal.total})
                target.matrix.mul_(target.matrix.abs() > target.matrix.abs().median())
    return found


# ---------------------------------------------------------------------- while training


def callback(calibration: Tensor | None = None, **options) -> MamaCallback:
    return MamaCallback(MamaConfig(**options), calibration)


def grpo(model: nn.Module, rewards: list, arguments: dict, calibration: Tensor | None = None, **options):
    """A `MamaGRPOTrainer`; `arguments` are those of its configuration."""
    return MamaGRPOTrainer(model, rewards, args=MamaGRPOConfig(**arguments), calibration=calibration, **options)


def distillation(student: nn.Module, teacher: nn.Module, arguments: dict, calibration: Tensor | None = None, **options):
    """A `MamaDistillationTrainer`; `arguments` are those of its configuration."""
    args = MamaDistillationConfig(**arguments)
    return MamaDistillationTrainer(student, teacher_model=teacher, args=args, calibration=calibration, **options)


def callback_of(trainer) -> MamaCallback:
    return trainer.mama


def masks_of(run: MamaCallback) -> MaskSet | None:
    return run.masks


def statistics_of(run: MamaCallback) -> dict[str, Tensor]:
    """The run's statistics, how many steps each has seen, and the samples written down."""
    return _statistics(run.trajectory)


def _statistics(trajectory: Trajectory) -> dict[str, Tensor]:
    found = {f"{s} {name}": v for s, values in trajectory.values.items() for name, v in values.items()}
    found |= {f"steps of {name}": count for name, count in trajectory.counts.items()}
    samples = [value for record in trajectory.history for value in (record["step"], *record["values"])]
    return {**found, "skipped": trajectory.skipped, "samples": torch.tensor(samples)}


def trajectory(model: nn.Module, steps: list[dict[str, Tensor]], statistics: list[str]) -> dict[str, Tensor]:
    """Statistics after gradients (by matrix name, in the parameter's layout) of some steps; no weight moves."""
    shards = shards_of((target.name, target.parameter) for target in find_targets(model))
    run = Trajectory(shards, statistics)
    for gradients in steps:
        for shard in shards:
            shard.parameter.grad = gradients[shard.name].to(shard.parameter.dtype)
        run.record()
    found = _statistics(run)
    for statistic in statistics:
        found |= {f"indicator {statistic} {name}": value for name, value in run.importance(statistic).items()}
    return found


def schedule(kind: str, sparsity: float, start: float, end: float, interval: int, steps: int) -> Tensor:
    """Sparsity after each step of a run, as masks are computed."""
    plan = Schedule.resolve(kind, sparsity, start, end, interval, steps)
    return torch.tensor([plan.sparsity(step) * plan.updates(step) for step in range(steps + 1)], dtype=torch.float64)


# ---------------------------------------------------------------------- pure functions of tensors


def solve(
    method: str, weight: Tensor, inputs: Tensor, sparsity: float, pattern: str = "unstructured", **options
) -> tuple[Tensor, Tensor]:
    """One matrix (out, in) by one method's own function; (weight, mask).

    Args:
        inputs: X, (tokens, in).
        options: for mama: importance, cross, by_row.
    """
    gram = Gram.zeros(weight.shape[1], "cpu")
    gram.add(inputs)
    group = parse_pattern(pattern)
    if method == "magnitude":
        return magnitude(weight, sparsity, group)
    if method == "wanda":
        return wanda(weight, gram.norm, sparsity, group)
    return {"sparsegpt": sparsegpt, "alps": alps, "mama": mama}[method](weight, gram.gram, sparsity, group, **options)


def redistributed(weight: Tensor, inputs: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """The parts of redistribution, each by itself."""
    gram, mean = inputs.T @ inputs, inputs.mean(0)
    scaled, scale = redistribution.unit_diagonal(gram, 1e-3)
    goal = redistribution.normal_equations(weight, scaled, scale, 1e-3, None)
    fitted = redistribution.conjugate_gradients(scaled, goal, mask, weight * scale * mask, 15)
    return {
        "scaled": scaled, "scale": scale, "goal": goal, "fitted": fitted,
        "mean": redistribution.mean(weight, mask), "bias": redistribution.bias_shift(weight, weight * mask, mean),
    }


def solved_structures(weight: Tensor, inputs: Tensor, size: int, keep: int) -> dict[str, Tensor]:
    """Which groups of `size` columns stay, and the refitted weight."""
    gram = inputs.T @ inputs
    kept = choose_structures(weight, gram, size, keep)
    return {"kept": kept, "weight": refit(weight, gram, kept.repeat_interleave(size))}


def formulas(weight: Tensor, gradient: Tensor, moment: Tensor, norm: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """Every indicator's formula."""
    return {
        "magnitude": indicators.magnitude(weight), "activation": indicators.activation(weight, norm),
        "sensitivity": indicators.sensitivity(weight, gradient),
        "movement": RULES["movement"].of_step(weight * gradient),
        "curvature": indicators.curvature(weight, moment), "with biases": weights_and_biases(weight, bias),
    }


def combine(scores: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    return combined(scores, weights)


def keep_largest(parts: list[Tensor], keep: int) -> list[Tensor]:
    """Bool masks of the `keep` largest of all parts together."""
    packed = packed_masks(parts, keep)
    return [unpack_bits(found, part.shape) for found, part in zip(packed, parts)]


def keep_in_matrix(scores: Tensor, sparsity: float, pattern: str = "unstructured", by_row: bool = False) -> Tensor:
    """Mask of one matrix (out, in)."""
    return matrix_mask(scores, sparsity, parse_pattern(pattern), by_row)


def keep_in_stored(scores: Tensor, rule: str, n: int, m: int = 0) -> Tensor:
    """Mask of scores stored (in, out), by `row` (n kept in each output) or `n:m`, as training computes it."""
    piece = OwnedScores(scores.flatten(), 0, tuple(scores.shape), transposed=True)
    mask = row_mask_of_owned(piece, n) if rule == "row" else nm_mask_of_owned(piece, n, m)
    return mask.view(scores.shape)


def keep_everywhere(scores: list[Tensor], sparsity: float, floor: float) -> list[Tensor]:
    """Masks of one threshold over all matrices; the scores stay as they are."""
    copies = [score.clone() for score in scores]
    packed = global_packed_masks(copies, [score.numel() for score in scores], sparsity, floor)
    return [unpack_bits(found, score.shape) for found, score in zip(packed, scores)]


def allocate(scores: list[Tensor], sparsity: float, blend: float) -> list[float]:
    """Sparsity of each matrix by a contest of their scores, blended with uniform."""
    densities = allocation.global_densities(scores, sparsity)
    return allocation.blended([score.numel() for score in scores], densities, sparsity, blend)


def order_free_mean(scores: Tensor) -> float:
    return exact_mean(scores, scores.numel())
