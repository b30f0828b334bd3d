"""What a rank holds of a parameter, seen the same way under every engine.

Engines keep weights, gradients and optimizer states in places of their own; what a rank owns of a parameter is one flat
contiguous range under all of them. Everything that reads or writes one of these during training asks a `Shard` for it,
so that single process, DDP, ZeRO-1/2/3 and FSDP2 give the same statistics and the same masks.

| engine | range | master | gradient before the step | working copies |
|---|---|---|---|---|
| single, DDP | everything | the parameter | `.grad` | none |
| FSDP2 | dim-0 slice | the local tensor | the local tensor of `.grad` | none |
| ZeRO-1, ZeRO-2 | fragment | fp32 fragment | averaged fragment | the whole 16-bit parameter on every rank |
| ZeRO-3 | padded slice | fp32 partition | averaged partition | the 16-bit partition, and the parameter while gathered |
"""

from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn

from . import ranks


@dataclass(eq=False)
class Shard:
    """What this rank owns of one parameter: the flat range [start, start + length) of its full `shape`.

    This class is the view of single process and DDP, where a rank owns everything; engines override it.
    All tensors are flat, detached and share memory with the engine's own, unless a method says otherwise.
    """

    name: str
    parameter: nn.Parameter
    gathered = True  # whether the working weights are whole on this rank, so that a module runs without the others
    reaches_frozen = True  # whether masks reach a frozen parameter, which an optimizer knows nothing of

    @staticmethod
    def recognises(parameter: nn.Parameter) -> bool:
        """Whether this view is the parameter's, by what its engine has left on it."""
        return True

    @staticmethod
    def engine() -> str:
        """The engine's name, once `recognises` has said yes."""
        return "ddp" if ranks.everyone() is not None else "single"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        return full_shape(self.parameter)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def start(self) -> int:
        return 0

    @property
    def length(self) -> int:
        return self.numel

    @property
    def group(self) -> ranks.Group:
        """The ranks over which the parameter is spread; None where each rank holds it whole."""
        return None

    @property
    def master(self) -> Tensor:
        """The values that the optimizer updates, (length,)."""
        return self.parameter.data.view(-1)

    @property
    def gradient(self) -> Optional[Tensor]:
        """The averaged and accumulated gradient just before the optimizer step, (length,), or None."""
        return None if self.parameter.grad is None else self.parameter.grad.view(-1)

    def optimizer_state(self, optimizer, key: str) -> Optional[Tensor]:
        """One state of the optimizer for the owned range, (length,); None if it keeps none by that name."""
        inner = getattr(optimizer, "optimizer", optimizer)
        state = inner.state.get(self.parameter, {}).get(key) if inner is not None else None
        return None if state is None else state.view(-1)

    @property
    def working_copies(self) -> list[Tensor]:
        """Other copies on this rank, flat: of the owned range, or (numel,) of the whole parameter."""
        return []

    @property
    def saved(self) -> Tensor:
        """The owned range as a file of the model would hold it: of the working copy where there is one, (length,)."""
        return self.master

    @property
    def bucket(self) -> int:
        """A key of those parameters that one call of the optimizer's step updates; under ZeRO-3 it is called often."""
        return 0

    def owned(self, whole: Tensor) -> Tensor:
        """The owned range of a tensor of the full shape."""
        return whole.reshape(-1)[self.start : self.start + self.length]

    def whole(self, owned: Tensor) -> Tensor:
        """A tensor of the full shape of which each rank gives its owned range, (length,). Collective over `group`."""
        if self.group is None:
            return owned.view(self.shape)
        whole = torch.zeros(self.numel, dtype=owned.dtype, device=owned.device)
        whole[self.start : self.start + self.length] = owned
        return ranks.total(whole, self.group).view(self.shape)

    def full(self) -> Tensor:
        """A copy of the whole parameter from the masters. Collective over `group`."""
        return self.whole(self.master.detach().clone())

    def write(self, whole: Tensor) -> None:
        """Puts the same `whole` values, given on every rank, into master and working copies."""
        self.master.copy_(self.owned(whole))

    def publish(self) -> None:
        """Brings the working copies to what the masters hold. Collective over `group`."""


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where this rank holds a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def group_of(shards: list[Shard]) -> ranks.Group:
    """The ranks over which these parameters are spread; None where every rank holds all of them."""
    return shards[0].group if shards else None


def fused_groups(shards: list[Shard]) -> list[list[tuple[Shard, int, int]]]:
    """Cuts shards into groups of (shard, begin, end) that one fused operation handles; empty shards are left out.

    A group stays within one device, dtype and bucket, and holds a bounded number of elements, so that temporary
    tensors stay small: in the processor's cache on a CPU, enough to fill a GPU. Segments begin at multiples of 8.
    """
    groups: list[list[tuple[Shard, int, int]]] = []
    filled, kind = 0, None
    for shard in shards:
        master = shard.master
        size = 1 << 18 if master.device.type == "cpu" else 1 << 24
        for begin in range(0, shard.length, size):
            end = min(begin + size, shard.length)
            here = (master.device, master.dtype, shard.bucket)
            if here != kind or filled + end - begin > size:
                groups.append([])
                filled, kind = 0, here
            groups[-1].append((shard, begin, end))
            filled += end - begin
    return groups
