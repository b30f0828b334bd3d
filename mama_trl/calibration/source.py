"""Where a decoder block can run: as it stands in the model, fetched from where it is kept, or gathered from ranks."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from ..engines import ranks
from ..engines.detect import shard_of
from ..engines.gather import plain_class
from ..engines.offload import drop, fetch, give_back
from ..engines.shard import Shard
from ..engines.zero import release_gathered
from ..model.blocks import find_blocks
from ..model.targets import Target


class BlocksInPlace:
    """Blocks as they stand in the model of this process."""

    may_stop = True  # whether a forward pass of the model may be ended by an exception

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


class FetchedBlocks(BlocksInPlace):
    """Blocks whose weights are on disk or in CPU memory until they run (engines/offload.py): one at a time is there.
    Those of a model that is there as a whole are as they stand.

    Args:
        folder: where changed blocks are written that lay on disk; None = what is changed is forgotten.
    """

    def __init__(self, folder: Optional[Path] = None):
        self._folder = folder
        self._own: list = []

    def take(self, index: int, name: str, block: nn.Module, own: list[Target]) -> tuple[nn.Module, list[Target]]:
        self._own = fetch(block)
        return block, own

    def release(self, index: int) -> None:
        if self._folder is None:
            drop(self._own)
        else:
            give_back(self._own, self._folder / f"block-{index:05d}.safetensors")


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
