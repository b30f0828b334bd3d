"""Removes whole structures, attention heads or MLP neurons, so that the model is really smaller.

A structure is a group of inputs of one linear layer (the *reader*: the attention's or the MLP's output projection)
together with the outputs of the layers that make them (the *writers*). Which ones go is decided by what their
absence costs after the others have been refitted to make up for them: in the layer problem
min ‖X (W − W')ᵀ‖² with the columns P of W' zero, removing P costs tr(W_P [(G⁻¹)_PP]⁻¹ W_Pᵀ) with G = Xᵀ X
(optimal brain surgeon for groups; as in ZipLM, arXiv 2302.04089, and structured SparseGPT). The cheapest go, G⁻¹ and W
are brought up to date, and so on; the kept columns are then refitted by least squares.

Nothing is known here of any architecture: layers are found by their shapes within one parent module, and the smaller
model is made from a changed config and compared, shape by shape and on real tokens, with the pruned one.
"""

import copy
import logging
from collections import defaultdict
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..calibration import Gram, blockwise
from ..config import check_choice, check_sparsity
from ..errors import MamaError
from ..redistribution import bias_shift, unit_diagonal
from ..selection import keep_mask, kept_count
from ..targets import Target, find_blocks, find_targets
from .prune import FEWEST_TOKENS
from .resume import Unfinished

logger = logging.getLogger(__name__)
STRUCTURES = ("heads", "neurons")
STRUCTURE_METHODS = ("mama", "wanda", "magnitude", "random")
DAMPING = 1e-2  # on the unit-diagonal gram
STEP = 0.02  # share of the living structures that goes at once
WIDTH_FIELDS = (
    "moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "inner_dim", "d_ff",
)


# ---------------------------------------------------------------------- the layer problem, pure functions


def structure_costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """What removing each structure costs when all others are refitted.

    Args:
        weight: (out, in), a structure is `size` consecutive columns.
        inverse: inverse of the damped gram, (in, in).

    Returns:
        (in / size,): tr(W_P [(G⁻¹)_PP]⁻¹ W_Pᵀ).
    """
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    count = weight.shape[1] // size
    columns = weight.t().reshape(count, size, -1)
    index = torch.arange(weight.shape[1], device=weight.device).view(count, size)
    blocks = inverse[index.unsqueeze(2), index.unsqueeze(1)]
    return (columns * torch.linalg.solve(blocks, columns)).sum((1, 2))


def choose_structures(weight: Tensor, gram: Tensor, size: int, keep: int, damping: float = DAMPING) -> Tensor:
    """Greedy backward elimination: bool (in / size,), True at `keep` kept structures.

    Args:
        weight: reader's weight, fp32 (out, in).
        gram: Xᵀ X of its inputs, fp32 (in, in).
        size: consecutive columns of a structure.
        damping: on the unit-diagonal gram.
    """
    scaled, scale = unit_diagonal(gram, damping)
    # Double precision: thousands of updates of one inverse add up their rounding.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(scaled.double()))
    weight = weight.double() * scale.double()
    count = weight.shape[1] // size
    kept = torch.ones(count, dtype=torch.bool, device=weight.device)
    alive = count
    while alive > keep:
        go = min(max(1, int(alive * STEP)), alive - keep)
        costs = structure_costs(weight, inverse, size).float().masked_fill(~kept, float("inf"))
        gone = keep_mask(-costs, go)  # the cheapest; those gone already cost infinitely much
        kept &= ~gone
        alive -= go
        columns = gone.repeat_interleave(size)
        solved = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        weight -= weight[:, columns] @ solved
        inverse.addmm_(inverse[:, columns], solved, alpha=-1)
        # Gone for good: a unit block keeps later solves regular.
        weight[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
        inverse.diagonal()[columns] = 1
    return kept


def refit(weight: Tensor, gram: Tensor, columns: Tensor, damping: float = DAMPING) -> Tensor:
    """Least-squares weights on the kept `columns` (bool (in,)): W_S + W_P G_PS (G_SS)⁻¹, zero elsewhere, fp32.

    Damped on the unit diagonal, towards W.
    """
    scaled, scale = unit_diagonal(gram, damping)
    scaled, scale = scaled.double(), scale.double()
    scaled_weight = weight.double() * scale
    new = torch.zeros_like(scaled_weight)
    moved = scaled_weight[:, ~columns] @ scaled[~columns][:, columns]
    factor = torch.linalg.cholesky(scaled[columns][:, columns])
    new[:, columns] = scaled_weight[:, columns] + torch.cholesky_solve(moved.t(), factor).t()
    return (new / scale).float()


def solve_structures(
    weight: Tensor,
    gram: Gram,
    size: int,
    keep: int,
    method: str = "mama",
    redistribution: str = "least_squares",
    has_bias: bool = False,
    importance: Optional[Tensor] = None,
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """One reader: which structures stay, its new weight, and what its bias gains.

    Args:
        weight: fp32 (out, in).
        gram: of its inputs.
        method: `mama` (cost after refitting), `wanda` (norm of the structure's columns × input norms), or
            `importance` given from outside (magnitude, random).
        redistribution: `least_squares` or `none`.
        has_bias: then the mean of what is missing goes into the bias and only deviations from it are fitted.
        importance: (in / size,), higher = kept.

    Returns:
        (bool (in / size,), fp32 (out, in) with zero columns, (out,) or None).
    """
    fitted = gram.centred if has_bias and redistribution == "least_squares" else gram.gram
    if importance is not None:
        kept = keep_mask(importance, keep)
    elif method == "wanda":
        kept = keep_mask((weight * gram.norm).square().sum(0).view(-1, size).sum(1), keep)
    else:
        kept = choose_structures(weight, fitted, size, keep)
    columns = kept.repeat_interleave(size)
    if redistribution == "none":
        return kept, weight * columns, None
    new = refit(weight, fitted, columns)
    return kept, new, bias_shift(weight, new, gram.mean) if has_bias else None


# ---------------------------------------------------------------------- what belongs together


@dataclass
class Unit:
    """The structures of one block, or of one expert in it: `writers` produce, group by group, what `reader` reads.

    `rows[i]` (structures, rows a structure, any number of parts) says which output rows of `writers[i]` make which
    structure.
    """

    block: int
    reader: Target
    writers: list[Target]
    rows: list[Tensor]
    size: int  # columns of the reader in a structure

    @property
    def count(self) -> int:
        return self.reader.shape[1] // self.size


def _by_parent(targets: list[Target]) -> dict[tuple, list[Target]]:
    found = defaultdict(list)
    for target in targets:
        if target.block is not None:
            parent = target.module_name if target.expert is not None else target.module_name.rpartition(".")[0]
            found[(target.block, parent, target.expert)].append(target)
    return found


def _neuron_unit(group: list[Target], hidden: int) -> Optional[Unit]:
    """An MLP: one layer back to `hidden`, and one or two (or one fused gate-and-up) that feed it."""
    for reader in group:
        width = reader.shape[1]
        writers = [t for t in group if t is not reader]
        if reader.shape[0] != hidden or not 1 <= len(writers) <= 2 or any(t.shape[1] != hidden for t in writers):
            continue
        one = torch.arange(width).view(width, 1)
        if all(t.shape[0] == width for t in writers):
            return Unit(reader.block, reader, writers, [one] * len(writers), 1)
        if len(writers) == 1 and writers[0].shape[0] == 2 * width:
            # Gate above up, or, as some fused experts say of themselves, in turn.
            in_turn = getattr(writers[0].module, "is_concatenated", True) is False
            pairs = torch.cat([2 * one, 2 * one + 1] if in_turn else [one, one + width], 1)
            return Unit(reader.block, reader, writers, [pairs], 1)
    return None


def _head_unit(group: list[Target], hidden: int, heads: int, groups: int, head_dim: int) -> Optional[Unit]:
    """An attention: query, key, value (or the three fused, one above the other) and the output projection."""
    inner, narrow = heads * head_dim, groups * head_dim

    def rows(start: int, per_group: int) -> Tensor:
        return start + torch.arange(groups * per_group).view(groups, per_group)

    query, key = rows(0, inner // groups), rows(0, head_dim)
    fused = torch.cat([query, rows(inner, head_dim), rows(inner + narrow, head_dim)], 1)
    for reader in reversed(group):  # query and output may be alike in shape; the output comes last
        writers = [t for t in group if t is not reader]
        if reader.shape != (hidden, inner) or any(t.shape[1] != hidden for t in writers):
            continue
        outputs = sorted((t.shape[0] for t in writers), reverse=True)
        if outputs == [inner, narrow, narrow]:
            chosen = [query if t.shape[0] == inner else key for t in writers]
        elif outputs == [inner + 2 * narrow]:
            chosen = [fused]
        else:
            continue
        return Unit(reader.block, reader, writers, chosen, inner // groups)
    return None


def find_units(model: nn.Module, structure: str) -> list[Unit]:
    """One `Unit` a block, or one an expert of a mixture, all alike.

    A mixture's neurons are those of its fused experts; dense MLPs beside them stay as they are. Raises `MamaError`
    where this model has no such structure.
    """
    config = model.config
    name = type(model).__name__
    hidden = getattr(config, "hidden_size", None)
    blocks = find_blocks(model)
    found: dict[str, list[Unit]] = defaultdict(list)  # by the place within a block
    for (block, parent, expert), group in _by_parent(find_targets(model, experts=True)).items():
        if structure == "neurons":
            unit = _neuron_unit(group, hidden)
        else:
            unit = _head_unit(group, hidden, *_head_shape(config, name)) if expert is None else None
        if unit is not None:
            found["experts" if expert is not None else parent.removeprefix(blocks[block][0])].append(unit)
    if "experts" in found:
        candidates = [found["experts"]]
    else:
        candidates = [units for units in found.values() if [u.block for u in units] == list(range(len(blocks)))]
    if not candidates:
        what = "MLP" if structure == "neurons" else "attention with separate or stacked query, key and value"
        raise MamaError(
            f"`pattern` is {structure}, but not every block of {name} has an {what} of plain linear layers: use "
            "unstructured or N:M for this model."
        )
    alike = [units for units in candidates if len({(unit.count, unit.size) for unit in units}) == 1]
    if not alike:
        raise MamaError(
            f"`pattern` is {structure}, but the blocks of {name} differ in their number of them, which one config "
            "cannot describe when they shrink: use unstructured or N:M for this model."
        )
    # An attention may by chance have the shapes of an MLP: the config knows which of them is one.
    described = (units for units in alike[:-1] if smaller_config(model, structure, units, 1) is not None)
    return next(described, alike[-1])


def _head_shape(config, name: str) -> tuple[int, int, int]:
    """(query heads, key/value heads, head_dim) of a config that has them as whole numbers."""
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(groups, int):
        raise MamaError(f"`pattern` is heads, but the config of {name} has no number of heads: use neurons.")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, groups, head_dim


# ---------------------------------------------------------------------- the smaller config


def _changed(config, **fields):
    """A copy of `config` with other fields; None if its class refuses them."""
    try:
        values = {**config.to_dict(), **fields}
        return type(config).from_dict(values)
    except Exception as error:  # each config class has its own way to refuse
        logger.debug("%s refuses %s: %s", type(config).__name__, fields, error)
        return None


def _shapes(model: nn.Module, config) -> dict[str, tuple]:
    """Shapes of the state dict of a model of `config`, nothing allocated."""
    try:
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in type(model)(copy.deepcopy(config)).state_dict().items()}
    except Exception as error:
        logger.debug("no %s of this config: %s", type(model).__name__, error)
        return {}


@torch.no_grad()
def _runs(model: nn.Module, config) -> bool:
    """Whether one block of `config`, with random weights, can do a forward pass.

    Some architectures have shapes of their own that fit the config and do not fit each other (a norm over all heads).
    """
    depth = getattr(config, "num_hidden_layers", None)
    lists = {k: v[:1] for k, v in config.to_dict().items() if isinstance(v, list) and len(v) == depth}
    short = _changed(config, num_hidden_layers=1, vocab_size=8, pad_token_id=None, **lists)
    if short is None:
        return True  # no such model: the comparison at the end decides
    try:
        small = type(model)._from_config(short, dtype=model.dtype).eval()
    except Exception as error:
        logger.debug("no %s of one block: %s", type(model).__name__, error)
        return True
    try:
        small(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except RuntimeError as error:
        logger.debug("%s of this config does not run: %s", type(model).__name__, error)
        return False
    return True


def _expected(model: nn.Module, units: list[Unit], keep: int) -> dict[str, tuple]:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def resize(target: Target, outputs: int, inputs: int) -> None:
        matrix = (inputs, outputs) if target.transposed else (outputs, inputs)
        shapes[target.parameter_name] = shapes[target.parameter_name][:-2] + matrix
        if target.bias is not None:
            name = f"{target.module_name}.{target.bias_attribute}"
            shapes[name] = shapes[name][:-1] + (outputs,)

    for unit in units:
        for target, rows in zip(unit.writers, unit.rows):
            resize(target, keep * rows.shape[1], target.shape[1])
        resize(unit.reader, unit.reader.shape[0], keep * unit.size)
    return shapes


def smaller_config(model: nn.Module, structure: str, units: list[Unit], keep: int):
    """The config of the model with `keep` structures a block, or None if no plain config describes it."""
    config = model.config
    if structure == "heads":
        heads, groups, head_dim = _head_shape(config, type(model).__name__)
        fields = {"num_attention_heads": heads // groups * keep, "head_dim": head_dim}
        if hasattr(config, "num_key_value_heads"):
            fields["num_key_value_heads"] = keep
        candidates = [_changed(config, **fields)]
    else:
        candidates = [_changed(config, **{field: keep}) for field in WIDTH_FIELDS if hasattr(config, field)]
    expected = _expected(model, units, keep)
    return next((c for c in candidates if c and _shapes(model, c) == expected), None)


def _nearest_describable(model, structure: str, units: list[Unit], sparsity: float):
    """(kept structures, config): the number nearest to the asked one that a plain config describes."""
    count = units[0].count
    wanted = kept_count(count, sparsity)
    reach = count if structure == "heads" else 1  # any number of neurons does, or none
    for keep in sorted(range(1, count), key=lambda keep: (abs(keep - wanted), -keep))[:reach]:
        config = smaller_config(model, structure, units, keep)
        if config is not None and _runs(model, config):
            if keep != wanted:
                logger.warning(
                    "%d of %d %s are kept in every layer, not %d: the config of %s cannot describe that number.",
                    keep, count, "key/value groups" if structure == "heads" else structure, wanted,
                    type(model).__name__,
                )
            return keep, config
    advice = "use neurons." if structure == "heads" else "use unstructured or N:M for this model."
    raise MamaError(
        f"`pattern` is {structure}, but no plain config of {type(model).__name__} describes the model with fewer of "
        f"them: {advice}"
    )


# ---------------------------------------------------------------------- the model


def prune_structures(
    model: nn.Module,
    calibration: Optional[Tensor],
    structure: str,
    sparsity: float = 0.5,
    method: str = "mama",
    redistribution: str = "least_squares",
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
    unfinished: Optional[Unfinished] = None,
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
        unfinished: as in `prune`.

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
    keep, config = _nearest_describable(model, structure, units, sparsity)
    by_name = {unit.reader.name: unit for unit in units}
    masks: dict[str, Tensor] = {}
    seen_rarely: list[str] = []
    generator = torch.Generator().manual_seed(seed)
    drawn = {unit.reader.name: torch.rand(unit.count, generator=generator) for unit in units}

    def visit(own: list[Target], grams: dict[str, Gram]) -> None:
        for target in own:
            unit, gram = by_name[target.name], grams.pop(target.name)
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
        if unfinished:
            unfinished.store(own, masks)

    bar = tqdm(total=len(find_blocks(model)), desc=f"prune {structure} ({method})", disable=not progress, unit="block")
    with bar, torch.no_grad():
        blockwise(
            model, calibration, [unit.reader for unit in units], visit, batch_size, lambda done, total: bar.update(1),
            skip=lambda own: unfinished is not None and unfinished.restore(own, masks),
        )
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
