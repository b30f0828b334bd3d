"""Reads weights for the solvers and writes their solutions back, on one process or shared out over ranks.

`LocalPlacement` is for a model that this process holds alone. `DistributedPlacement` is for a training run of several
processes: each calibrates on its own tokens, the grams are added up, the matrices of a layer group are solved on
different ranks at once, and every rank writes what it owns of the results. (Where a block can run is
calibration/source.py's.)
"""

from pathlib import Path
from typing import MutableMapping, Optional

import torch
from torch import Tensor, nn

from ..calibration.grams import Measured
from ..calibration.source import BlocksInPlace, FetchedBlocks, blocks_of
from ..engines import ranks
from ..engines.detect import shards_of
from ..engines.shard import Shard
from ..masks.bits import PackedMasks, bytes_for, pack_bits, unpack_bits
from ..masks.maskset import MaskSet
from ..model.targets import Target, stacked
from ..solvers.problem import Solution


class LocalPlacement:
    """The whole model in this process; weights are read and written in place.

    Args:
        targets: the matrices to prune.
        offload: where changed blocks are written, of a model whose blocks are elsewhere until they run; default: the
            whole model is there.

    `found` holds the bool masks (out, in) by target name.
    """

    def __init__(self, targets: list[Target], offload: Optional[Path] = None):
        self.targets = targets
        self.source = BlocksInPlace() if offload is None else FetchedBlocks(offload)
        self.found: MutableMapping[str, Tensor] = PackedMasks()

    def add_up(self, measured: Measured) -> None:
        """Makes the grams and goals those of all ranks' tokens."""

    def read(self, group: list[Target], target: Target) -> Optional[tuple[Tensor, Optional[Tensor]]]:
        """(weight (out, in), bias (out,) or None), fp32; None if another rank solves this matrix of `group`."""
        return target.matrix.float(), None if target.bias is None else target.bias.detach().float()

    def write(self, group: list[Target], solved: dict[str, Solution]) -> None:
        """Puts solutions, by target name, into the weights."""
        for target in group:
            solution = solved[target.name]
            _write_here(target, solution)
            self.found[target.name] = solution.mask

    def masks(self, pattern: str) -> MaskSet:
        """The masks of all that was written; bound to the parameters, if these are there."""
        result = MaskSet.from_masks(stacked(self.targets, self.found), pattern)
        if not isinstance(self.source, FetchedBlocks):
            result.bind(shards_of({target.parameter_name: target.parameter for target in self.targets}.items()))
        return result


def _write_here(target: Target, solution: Solution) -> None:
    target.matrix.copy_(solution.weight)
    if solution.bias is not None:
        target.bias.data.copy_(solution.bias)


class DistributedPlacement(LocalPlacement):
    """A training run. Every method is collective.

    Args:
        model: the unwrapped model.
        targets: the matrices to prune.
        shards: of the targets' weights and biases, by parameter name.
        group: all processes; each calibrates on its own tokens.
    """

    def __init__(self, model: nn.Module, targets: list[Target], shards: dict[str, Shard], group: ranks.Group):
        super().__init__(targets)
        self.source = blocks_of(model, shards, group)
        self._shards, self._group = shards, group
        self._packed: dict[str, Tensor] = {}

    def _solver(self, group: list[Target], target: Target) -> int:
        """The rank that solves `target`."""
        return [t.name for t in group].index(target.name) % ranks.size(self._group)

    def add_up(self, measured: Measured) -> None:
        # Layers with one input share one gram.
        for gram in {id(gram): gram for gram in measured.grams.values()}.values():
            gram.gram = ranks.total(gram.gram, self._group)
            gram.total = ranks.total(gram.total, self._group)
            tokens = torch.tensor(gram.tokens, dtype=torch.int64, device=gram.gram.device)
            gram.tokens = int(ranks.total(tokens, self._group))
        for name in sorted(measured.goals):
            goal = measured.goals[name]
            goal.cross = ranks.total(goal.cross, self._group)
            goal.total = ranks.total(goal.total, self._group)

    def read(self, group: list[Target], target: Target) -> Optional[tuple[Tensor, Optional[Tensor]]]:
        # From the masters: the working copy may be rounded.
        weight = self._shards[target.name].full()
        bias = self._shards[f"{target.module_name}.bias"].full() if target.bias is not None else None
        if self._solver(group, target) != ranks.rank(self._group):
            return None
        weight = target.oriented(weight).float().to(target.device)
        return weight, None if bias is None else bias.float().to(target.device)

    def write(self, group: list[Target], solved: dict[str, Solution]) -> None:
        for target in group:
            solution = self._handed_out(self._solver(group, target), target, solved.pop(target.name, None))
            if not self.source.may_stop and target.block is not None:
                _write_here(target, solution)  # the plain copy, which later groups run through
            shard = self._shards[target.name]
            shard.write(target.oriented(solution.weight).contiguous().to(shard.master.device, shard.master.dtype))
            flags = shard.owned(target.oriented(solution.mask).contiguous())
            self._packed[target.name] = pack_bits(flags).to(shard.master.device)
            if solution.bias is not None:
                bias = self._shards[f"{target.module_name}.bias"]
                bias.write(solution.bias.to(bias.master.device, bias.master.dtype))

    def _handed_out(self, source: int, target: Target, own: Optional[Solution]) -> Solution:
        """The solution of the rank that solved this matrix."""
        group = self._group
        if group is None:
            return own
        outputs, inputs = target.shape
        empty = torch.empty(0, device=target.device)
        weight = own.weight if own else empty.new_empty(outputs, inputs)
        packed = pack_bits(own.mask) if own else empty.new_empty(bytes_for(outputs * inputs), dtype=torch.uint8)
        # Whether the bias changes is the same on every rank, but only the solver knows it.
        has_bias = torch.tensor(own is not None and own.bias is not None, dtype=torch.uint8, device=target.device)
        weight = ranks.from_rank(weight, source, group)
        mask = unpack_bits(ranks.from_rank(packed, source, group), (outputs, inputs))
        bias = None
        if ranks.from_rank(has_bias, source, group):
            bias = ranks.from_rank(own.bias if own else empty.new_empty(outputs), source, group)
        return Solution(weight, mask, bias)

    def masks(self, pattern: str) -> MaskSet:
        return MaskSet.from_shards(self._packed, [self._shards[target.name] for target in self.targets], pattern)
