"""Where a mask update finds a block's matrices, and how the solved ones get back.

`Local` is for a model that this process holds alone. `Spread` is for a training run of several processes: each
gathers one matrix at a time, the matrices of a block are solved on different ranks at once, and every rank writes
what it owns of the results. Beyond its shards a rank holds one block's grams and its share of one block's matrices.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from . import ranks
from .bits import bytes_for, pack_bits, unpack_bits
from .calibration import Gram
from .masks import MaskSet
from .shards import Shard, settle, shards_of
from .targets import Target


@dataclass
class Solved:
    """One solved matrix: `weight` fp32 (out, in), bool `mask` (out, in), what the bias gains (out,) or None."""

    weight: Tensor
    mask: Tensor
    bias: Optional[Tensor] = None


class Local:
    """The whole model in this process; weights are read and written in place."""

    def __init__(self):
        self._masks: dict[str, Tensor] = {}

    def add_up(self, grams: dict[str, Gram]) -> None:
        """Makes the grams those of all ranks' tokens."""

    def read(self, targets: list[Target]) -> dict[str, Tensor]:
        """The matrices that this process has to solve, fp32 (out, in)."""
        return {target.name: target.matrix.float() for target in targets}

    def write(self, targets: list[Target], solved: dict[str, Solved]) -> None:
        for target in targets:
            result = solved[target.name]
            target.matrix.copy_(result.weight)
            if result.bias is not None:
                target.bias.data += result.bias.to(target.bias.dtype)
            self._masks[target.name] = target.oriented(result.mask).contiguous()

    def masks(self, targets: list[Target], pattern: str) -> MaskSet:
        result = MaskSet.from_masks({target.name: self._masks[target.name] for target in targets}, pattern)
        result.bind(shards_of((target.name, target.parameter) for target in targets))
        return result


class Spread(Local):
    """A training run. Every method is collective.

    Args:
        model: the unwrapped model.
        shards: of the targets' weights and biases, by parameter name.
        group: all processes; each has calibrated on its own tokens.
    """

    def __init__(self, model: nn.Module, shards: dict[str, Shard], group: ranks.Group):
        super().__init__()
        self._model, self._shards, self._group = model, shards, group

    def _mine(self, index: int) -> bool:
        return index % ranks.size(self._group) == ranks.rank(self._group)

    def add_up(self, grams: dict[str, Gram]) -> None:
        for gram in grams.values():
            gram.gram = ranks.total(gram.gram, self._group)
            gram.total = ranks.total(gram.total, self._group)
            tokens = torch.tensor(gram.tokens, dtype=torch.int64, device=gram.gram.device)
            gram.tokens = int(ranks.total(tokens, self._group))

    def read(self, targets: list[Target]) -> dict[str, Tensor]:
        mine = {}
        for index, target in enumerate(targets):
            whole = self._shards[target.name].full()
            if self._mine(index):
                mine[target.name] = target.oriented(whole).float().to(target.device)
        return mine

    def write(self, targets: list[Target], solved: dict[str, Solved]) -> None:
        settle(self._model)
        for index, target in enumerate(targets):
            result = self._handed_out(index, target, solved.pop(target.name, None))
            shard = self._shards[target.name]
            shard.write(target.oriented(result.weight).contiguous().to(shard.master.device, shard.master.dtype))
            flags = shard.owned(target.oriented(result.mask).contiguous())
            self._masks[target.name] = pack_bits(flags).to(shard.master.device)
            if result.bias is not None:
                bias = self._shards[f"{target.module_name}.bias"]
                bias.write(bias.full() + result.bias.to(bias.master.device, bias.master.dtype))

    def _handed_out(self, index: int, target: Target, own: Optional[Solved]) -> Solved:
        """The result of the rank that solved this matrix."""
        source, group = index % ranks.size(self._group), self._group
        if group is None:
            return own
        outputs, inputs = target.shape
        empty = torch.empty(0, device=target.device)
        weight = own.weight if own else empty.new_empty(outputs, inputs)
        packed = pack_bits(own.mask) if own else empty.new_empty(bytes_for(outputs * inputs), dtype=torch.uint8)
        # Whether there is a shift is the same on every rank, but only the solver knows it.
        has_bias = torch.tensor(own is not None and own.bias is not None, dtype=torch.uint8, device=target.device)
        weight = ranks.from_rank(weight, source, group)
        mask = unpack_bits(ranks.from_rank(packed, source, group), (outputs, inputs))
        bias = None
        if ranks.from_rank(has_bias, source, group):
            bias = ranks.from_rank(own.bias if own else empty.new_empty(outputs), source, group)
        return Solved(weight, mask, bias)

    def masks(self, targets: list[Target], pattern: str) -> MaskSet:
        return MaskSet.from_shards(self._masks, [self._shards[target.name] for target in targets], pattern)
