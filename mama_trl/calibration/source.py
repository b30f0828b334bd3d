"""Where a decoder block can run: as it stands in the model, or gathered from the ranks that share its parameters."""

import copy
from contextlib import contextmanager
from dataclasses import replace
from typing import Callable, Iterator, Optional

import torch
from torch import Tensor, nn

from ..engines import ranks
from ..engines.detect import shard_of
from ..engines.gather import plain_class
from ..engines.shard import Shard
from ..engines.zero import release_gathered
from ..model.blocks import find_blocks
from ..model.targets import Target


class BlocksInPlace:
    """Blocks as they stand in the model of this process."""

    may_stop = True  # whether a forward pass of the model may be ended by an exception
    device: Optional[torch.device] = None  # where blocks run that are fetched there one at a time

    def broadcast_tokens(self, tokens: Tensor) -> Tensor:
        """The first rank's `tokens` (1-D), on every rank, whatever length the others' have."""
        return tokens

    def passes(self, number: int) -> int:
        """How many forward passes of the whole model this rank takes part in, of which `number` are its own."""
        return number

    def take(self, index: int, name: str, block: nn.Module, own: list[Target]) -> tuple[nn.Module, list[Target]]:
        """A block that runs without any other rank, and its targets `own`."""
        return block, own

    def release(self, index: int) -> None:
        """Frees what `take` has made for this block."""

    def by_block(self, targets: list[Target]) -> Iterator[list[Target]]:
        """The targets in parts whose weights can be read while a part is looked at."""
        yield targets

    @contextmanager
    def borrowed(self, index: int) -> Iterator[None]:
        """The block with this number can run for a while."""
        yield


class BorrowedBlocks(BlocksInPlace):
    """Blocks that are not where they can run: each is fetched there for a while, one at a time.

    Args:
        model: whose blocks they are; its other parts stay where they are.
        device: where blocks run.
        fetch, free: bring the block with this number there, and away from it.
    """

    def __init__(
        self, model: nn.Module, device: torch.device, fetch: Callable[[int], None], free: Callable[[int], None]
    ):
        self.device = device
        self._blocks, self._fetch, self._free = find_blocks(model), fetch, free

    def take(self, index: int, name: str, block: nn.Module, own: list[Target]) -> tuple[nn.Module, list[Target]]:
        self._fetch(index)
        return block, own

    def release(self, index: int) -> None:
        self._free(index)

    def by_block(self, targets: list[Target]) -> Iterator[list[Target]]:
        for index, (name, _) in enumerate(self._blocks):
            with self.borrowed(index):
                yield [target for target in targets if target.module_name.startswith(name + ".")]
        yield [target for target in targets if target.block is None]

    @contextmanager
    def borrowed(self, index: int) -> Iterator[None]:
        self._fetch(index)
        try:
            yield
        finally:
            self._free(index)


def blocks_on(model: nn.Module, device: torch.device) -> BorrowedBlocks:
    """Blocks of a model in CPU memory, which run on `device`, one at a time."""
    blocks = [block for _, block in find_blocks(model)]
    return BorrowedBlocks(model, device, lambda i: blocks[i].to(device), lambda i: blocks[i].to("cpu"))


class GatheredBlocks(BlocksInPlace):
    """Blocks of a model whose parameters ranks share: one block at a time becomes a plain copy on every rank.

    The copy comes from a model built anew on the meta device, without any engine's hooks, since those would run
    collectives in the middle of one rank's own forward pass. Every method is collective.

    Args:
        model: the unwrapped model.
        shards: of the targets' weights and biases, by parameter name.
        group: all processes.
    """

    may_stop = False  # an engine's hooks must see every forward pass to its end

    def __init__(self, model: nn.Module, shards: dict[str, Shard], group: ranks.Group):
        self._model, self._shards, self._group = model, shards, group
        self._plain: Optional[nn.Module] = None

    def broadcast_tokens(self, tokens: Tensor) -> Tensor:
        return ranks.row_from_rank(tokens, 0, self._group)

    def passes(self, number: int) -> int:
        # Each pass gathers the parameters from all ranks: one that has fewer batches must go along.
        return ranks.largest(number, self._group, next(self._model.parameters()).device)

    def take(self, index: int, name: str, block: nn.Module, own: list[Target]) -> tuple[nn.Module, list[Target]]:
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
        if self._plain is None:
            with torch.device("meta"):
                self._plain = plain_class(self._model)(copy.deepcopy(self._model.config)).eval()
        return find_blocks(self._plain)[index][1]

    def release(self, index: int) -> None:
        self._plain_block(index).to_empty(device="meta")


class BroadcastBlocks(BlocksInPlace):
    """Blocks in place on several ranks, each of which holds the whole working weights (DDP, ZeRO-1 and ZeRO-2)."""

    def __init__(self, group: ranks.Group):
        self._group = group

    def broadcast_tokens(self, tokens: Tensor) -> Tensor:
        return ranks.row_from_rank(tokens, 0, self._group)


def blocks_of(model: nn.Module, shards: dict[str, Shard], group: ranks.Group) -> BlocksInPlace:
    """How the blocks of a training model can run, by what its engine leaves on a rank."""
    if all(shard.gathered for shard in shards.values()):
        return BroadcastBlocks(group)
    return GatheredBlocks(model, shards, group)
