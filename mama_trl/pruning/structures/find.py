"""Finds heads and neurons by the shapes of the layers within one parent module."""

from collections import defaultdict
from typing import Optional

import torch
from torch import Tensor, nn

from ...errors import MamaError
from ...model.blocks import find_blocks
from ...model.targets import Target, find_targets
from .smaller import smaller_config
from .units import Unit, head_shape


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
            unit = _head_unit(group, hidden, *head_shape(config, name)) if expert is None else None
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
