"""Where a mask update finds a block and its matrices, and how the solved ones get back.

`LocalPlacement` is for a model that this process holds alone. `DistributedPlacement` is for a training run of several
processes: each calibrates on its own tokens, the grams are added up, the matrices of a stage are solved on different
ranks at once, and every rank writes what it owns of the results. Where the parameters are sharded, a block is gathered
into a plain copy that each rank runs alone, one block at a time: beyond its shards a rank holds one block and its
grams.
"""

import copy
from dataclasses import replace
from typing import Optional

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..engines import ranks
from ..engines.detect import shard_of, shards_of
from ..engines.shard import Shard
from ..engines.zero import release_gathered
from ..masks.bits import bytes_for, pack_bits, unpack_bits
from ..masks.maskset import MaskSet
from ..model.blocks import find_blocks
from ..model.targets import Target, stack_experts
from ..solvers.problem import Gram, Solution


class LocalPlacement:
    """The whole model in this process; weights are read and written in place.

    `found` holds the bool masks (out, in) by target name.
    """

    may_stop = True  # whether a forward pass of the model may be ended by an exception

    def __init__(self):
        self.found: dict[str, Tensor] = {}

    def same(self, tokens: Tensor) -> Tensor:
        """`tokens` that are the same on every rank."""
        return tokens

    def runnable(self, index: int, name: str, block: nn.Module, own: list[Target]) -> tuple[nn.Module, list[Target]]:
        """A block that runs without any other rank, and its targets."""
        return block, own

    def release(self, index: int) -> None:
        """The block is done with."""

    def add_up(self, grams: dict[str, Gram], goals: dict) -> None:
        """Makes the grams and goals those of all ranks' tokens."""

    def read(self, own: list[Target], target: Target) -> Optional[tuple[Tensor, Optional[Tensor]]]:
        """(weight (out, in), bias (out,) or None), fp32; None if another rank solves this matrix."""
        return target.matrix.float(), None if target.bias is None else target.bias.detach().float()

    def write(self, own: list[Target], solved: dict[str, Solution]) -> None:
        for target in own:
            result = solved[target.name]
            _write_here(target, result)
            self.found[target.name] = result.mask

    def masks(self, targets: list[Target], pattern: str) -> MaskSet:
        result = MaskSet.from_masks(stack_experts(targets, self.found), pattern)
        result.bind(shards_of({target.parameter_name: target.parameter for target in targets}.items()))
        return result


def _write_here(target: Target, result: Solution) -> None:
    target.matrix.copy_(result.weight)
    if result.bias is not None:
        target.bias.data.copy_(result.bias)


class DistributedPlacement(LocalPlacement):
    """A training run. Every method is collective.

    Args:
        model: the unwrapped model.
        shards: of the targets' weights and biases, by parameter name.
        group: all processes; each calibrates on its own tokens.
    """

    def __init__(self, model: nn.Module, shards: dict[str, Shard], group: ranks.Group):
        super().__init__()
        self._model, self._shards, self._group = model, shards, group
        # ZeRO-1 and ZeRO-2 leave whole working weights on every rank, whose blocks run as they are.
        self._sharded = not all(shard.gathered for shard in shards.values())
        self.may_stop = not self._sharded
        self._plain: Optional[nn.Module] = None
        self._packed: dict[str, Tensor] = {}

    def same(self, tokens: Tensor) -> Tensor:
        return ranks.from_rank(tokens.clone(), 0, self._group)

    # ------------------------------------------------------------------ one block

    def runnable(self, index: int, name: str, block: nn.Module, own: list[Target]) -> tuple[nn.Module, list[Target]]:
        if not self._sharded:
            return block, own
        release_gathered(self._model)
        plain = self._plain_block(index)
        device = next(iter(self._shards.values())).parameter.device
        plain.to_empty(device=device)
        theirs = dict(block.named_parameters())
        for local, parameter in plain.named_parameters():
            shard = self._shards.get(f"{name}.{local}") or shard_of(f"{name}.{local}", theirs[local])
            parameter.data = shard.full().to(device, theirs[local].dtype)
        for (_, mine), (_, buffer) in zip(plain.named_buffers(), block.named_buffers()):
            mine.data.copy_(buffer)
        modules = dict(plain.named_modules())
        return plain, [replace(t, module=modules[t.module_name[len(name) + 1 :]]) for t in own]

    def _plain_block(self, index: int) -> nn.Module:
        """The block without weights and without any engine's hooks, from a model built anew."""
        if self._plain is None:
            cls = next(c for c in type(self._model).__mro__ if not issubclass(c, FSDPModule))
            with torch.device("meta"):
                self._plain = cls(copy.deepcopy(self._model.config)).eval()
        return find_blocks(self._plain)[index][1]

    def release(self, index: int) -> None:
        if self._sharded:
            self._plain_block(index).to_empty(device="meta")

    # ------------------------------------------------------------------ one stage

    def _solver(self, own: list[Target], target: Target) -> int:
        return [t.name for t in own].index(target.name) % ranks.size(self._group)

    def add_up(self, grams: dict[str, Gram], goals: dict) -> None:
        for gram in {id(gram): gram for gram in grams.values()}.values():  # layers with one input share one gram
            gram.gram = ranks.total(gram.gram, self._group)
            gram.total = ranks.total(gram.total, self._group)
            tokens = torch.tensor(gram.tokens, dtype=torch.int64, device=gram.gram.device)
            gram.tokens = int(ranks.total(tokens, self._group))
        for name in sorted(goals):
            goals[name].cross = ranks.total(goals[name].cross, self._group)
            goals[name].total = ranks.total(goals[name].total, self._group)

    def read(self, own: list[Target], target: Target) -> Optional[tuple[Tensor, Optional[Tensor]]]:
        # From the masters: the working copy may be rounded.
        weight = self._shards[target.name].full()
        bias = self._shards[f"{target.module_name}.bias"].full() if target.bias is not None else None
        if self._solver(own, target) != ranks.rank(self._group):
            return None
        weight = target.oriented(weight).float().to(target.device)
        return weight, None if bias is None else bias.float().to(target.device)

    def write(self, own: list[Target], solved: dict[str, Solution]) -> None:
        for target in own:
            result = self._handed_out(self._solver(own, target), target, solved.pop(target.name, None))
            if self._sharded and target.block is not None:
                _write_here(target, result)  # the plain copy, which later stages run through
            shard = self._shards[target.name]
            shard.write(target.oriented(result.weight).contiguous().to(shard.master.device, shard.master.dtype))
            flags = shard.owned(target.oriented(result.mask).contiguous())
            self._packed[target.name] = pack_bits(flags).to(shard.master.device)
            if result.bias is not None:
                bias = self._shards[f"{target.module_name}.bias"]
                bias.write(result.bias.to(bias.master.device, bias.master.dtype))

    def _handed_out(self, source: int, target: Target, own: Optional[Solution]) -> Solution:
        """The result of the rank that solved this matrix."""
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

    def masks(self, targets: list[Target], pattern: str) -> MaskSet:
        return MaskSet.from_shards(self._packed, [self._shards[target.name] for target in targets], pattern)
