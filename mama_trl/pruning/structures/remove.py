"""Removes whole structures, attention heads or MLP neurons, so that the model is really smaller.

A structure is a group of inputs of one linear layer (the *reader*: the attention's or the MLP's output projection)
together with the outputs of the layers that make them (the *writers*). Which ones go is decided by what their
absence costs after the others have been refitted to make up for them (solvers/groups.py).

Nothing is known here of any architecture: layers are found by their shapes within one parent module, and the smaller
model is made from a changed config and compared, shape by shape and on real tokens, with the pruned one.
"""

import logging
from collections import defaultdict
from contextlib import closing
from typing import Optional

import torch
from torch import Tensor, nn

from ...calibration.blockwise import blockwise
from ...calibration.progress import Progress
from ...config import check_choice, check_sparsity
from ...errors import MamaError
from ...selection.threshold import kept_count
from ...solvers.groups import solve_structures
from ..prune import FEWEST_TOKENS
from .find import find_units
from .smaller import nearest_describable
from .units import STRUCTURES, Unit

logger = logging.getLogger(__name__)
STRUCTURE_METHODS = ("mama", "wanda", "magnitude", "random")


def prune_structures(
    model: nn.Module,
    calibration: Optional[Tensor],
    structure: str,
    sparsity: float = 0.5,
    method: str = "mama",
    redistribution: str = "least_squares",
    batch_size: int = 8,
    seed: int = 0,
    progress: bool | Progress = True,
) -> nn.Module:
    """A smaller model with the same number of heads or neurons removed in every block.

    Each block is calibrated on the outputs of the blocks before it, already pruned. `model` is changed in place (its
    removed structures are zero) and is of no more use than the smaller one.

    Args:
        calibration: token ids, int64 (n, sequence_length); magnitude and random without redistribution need none.
        structure: `heads` (by key/value group) or `neurons`.
        sparsity: share of the structures that goes, in [0, 1). Heads: the nearest number that the config's own
            rules allow, logged if it differs.
        method: `mama`, or the controls `wanda`, `magnitude` and `random` (drawn with `seed`).
        redistribution: `least_squares` (the kept columns refitted, and the mean into a bias where there is one) or
            `none`.
        progress: as in `prune`.

    Returns:
        A new model of the same class, dtype and device.

    Raises:
        MamaError: a value makes no sense, calibration is missing, or this architecture cannot be described so.
    """
    check_choice(structure, STRUCTURES, "pattern")
    check_choice(method, STRUCTURE_METHODS, "method")
    check_choice(redistribution, ("none", "least_squares"), "redistribution")
    check_sparsity(sparsity)
    if calibration is None:
        raise MamaError(f"`calibration` is missing: pattern {structure} needs token ids (n, sequence_length).")
    units = find_units(model, structure)
    what = "key/value groups of heads" if structure == "heads" else structure
    if kept_count(units[0].count, sparsity) == units[0].count:
        mend = f"give at least {1 / units[0].count:.2g}." if units[0].count > 1 else "one must stay; use neurons."
        raise MamaError(
            f"`sparsity` is {sparsity}, which removes none of the {units[0].count} {what} of a block: {mend}"
        )
    keep, config = nearest_describable(model, structure, units, sparsity)
    by_name = {unit.reader.name: unit for unit in units}
    masks: dict[str, Tensor] = {}
    seen_rarely: list[str] = []
    generator = torch.Generator().manual_seed(seed)
    drawn = {unit.reader.name: torch.rand(unit.count, generator=generator) for unit in units}

    if not isinstance(progress, Progress):
        progress = Progress(f"prune {structure} ({method})", progress)
    progress.masks = masks
    walk = blockwise(model, calibration, [unit.reader for unit in units], progress, batch_size)
    with torch.no_grad(), closing(progress), closing(walk):
        for measured in walk:
            for target in measured.targets:
                unit, gram = by_name[target.name], measured.grams.pop(target.name)
                rare = gram.tokens < min(FEWEST_TOKENS, calibration.numel())
                if rare:
                    seen_rarely.append(target.name)
                importance = None
                if method == "magnitude" or rare:
                    importance = _size_of_structures(unit)
                elif method == "random":
                    importance = drawn[target.name].to(target.parameter.device)
                kept, new, shift = solve_structures(
                    target.matrix.float(), gram, unit.size, keep, method, "none" if rare else redistribution,
                    target.bias is not None, importance,
                )
                target.matrix.copy_(new)
                if shift is not None:
                    target.bias.data += shift.to(target.bias.dtype)
                masks[target.name] = kept.repeat_interleave(unit.size).expand(target.shape)
    if seen_rarely:
        logger.warning(
            "%d of %d experts saw fewer than %d calibration tokens: their %s were chosen by magnitude and nothing was "
            "refitted (%s%s); more calibration tokens would reach them.",
            len(seen_rarely), len(units), FEWEST_TOKENS, structure, ", ".join(seen_rarely[:5]),
            ", ..." if len(seen_rarely) > 5 else "",
        )
    kept = {name: mask[0].view(-1, by_name[name].size)[:, 0] for name, mask in masks.items()}
    small = _build(model, config, units, kept)
    _compare(model, small, calibration[:1])
    return small


def _size_of_structures(unit: Unit) -> Tensor:
    """Sum of the squares of all weights of each structure, reader and writers, (structures,)."""
    total = unit.reader.matrix.float().square().sum(0).view(-1, unit.size).sum(1)
    for target, rows in zip(unit.writers, unit.rows):
        total = total + target.matrix.float().square().sum(1)[rows.to(total.device)].sum(1)
    return total


@torch.no_grad()
def _build(model: nn.Module, config, units: list[Unit], kept: dict[str, Tensor]) -> nn.Module:
    """A model of `config` with the kept rows and columns of `model`; `kept[reader's name]` bool (structures,)."""
    state = dict(model.state_dict())
    parts: dict[str, list[Tensor]] = defaultdict(list)  # by name in the state dict; one an expert, in order
    for unit in units:
        mask = kept[unit.reader.name]
        for target, rows in zip(unit.writers, unit.rows):
            # Sorted, so that the parts of a fused layer stay one above the other.
            chosen = rows.to(mask.device)[mask].flatten().sort().values
            parts[target.parameter_name].append(target.oriented(target.matrix[chosen]))
            if target.bias is not None:
                parts[f"{target.module_name}.{target.bias_attribute}"].append(target.bias.data[chosen])
        reader = unit.reader
        cut = reader.matrix[:, mask.repeat_interleave(unit.size)]
        parts[reader.parameter_name].append(reader.oriented(cut))
    for name, pieces in parts.items():
        state[name] = torch.stack(pieces) if state[name].dim() == pieces[0].dim() + 1 else pieces[0].contiguous()
    config._attn_implementation = model.config._attn_implementation
    small = type(model)(config).to(next(model.parameters()).device)
    # What was not cut is shared with `model`, not copied.
    small.load_state_dict(state, strict=True, assign=True)
    small.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        small.generation_config = model.generation_config
    return small.train(model.training)


@torch.no_grad()
def _compare(model: nn.Module, small: nn.Module, rows: Tensor) -> None:
    """Raises `MamaError` if the smaller model does not compute what the changed one computes on `rows`."""
    training = model.training
    rows = rows.to(next(model.parameters()).device)
    try:
        one, other = (m.eval()(input_ids=rows, use_cache=False).logits.float() for m in (model, small))
    except RuntimeError as error:
        raise MamaError(
            f"no plain config describes the smaller {type(model).__name__} (it does not run: {error}): use "
            "unstructured or N:M for this model."
        ) from error
    finally:
        model.train(training), small.train(training)
    tolerance = 1e-3 if next(model.parameters()).dtype == torch.float32 else 0.1
    difference = float((one - other).abs().max() / one.abs().max().clamp_min(1e-6))
    if not difference <= tolerance:
        raise MamaError(
            f"the smaller {type(model).__name__} does not compute what the pruned one does (relative difference "
            f"{difference:.2g}): its structures are not where its shapes suggest; use unstructured or N:M."
        )
