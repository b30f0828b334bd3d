"""What the weights hold, counted: exact zeros, and NaN or infinity. One host synchronisation for all parameters."""

from typing import Optional

import torch
from torch import Tensor

from . import ranks
from .shard import Shard, group_of


@torch.no_grad()
def zeros_of(shards: list[Shard]) -> dict[str, int]:
    """Exact zeros of each whole parameter, as a file of the model would hold them. Collective."""
    device = shards[0].parameter.device
    counts = torch.stack([_zeros(shard.saved).to(device) for shard in shards])
    return {shard.name: zeros for shard, zeros in zip(shards, ranks.total(counts, group_of(shards)).tolist())}


@torch.no_grad()
def first_not_finite(shards: list[Shard]) -> Optional[str]:
    """The first parameter that holds NaN or infinity in any copy on any rank, the same on all of them. Collective."""
    device = shards[0].parameter.device
    bad = torch.stack([_not_finite([shard.master, *shard.working_copies], device) for shard in shards])
    found = ranks.total(bad.int(), ranks.everyone()).nonzero()
    return shards[int(found[0])].name if len(found) else None


def some_not_finite(tensors: dict[str, Tensor]) -> Optional[str]:
    """The first of these tensors that holds NaN or infinity. Of this process alone."""
    floating = {name: value for name, value in tensors.items() if value.is_floating_point()}
    if not floating:
        return None
    device = next(iter(floating.values())).device
    found = torch.stack([_not_finite([value], device) for value in floating.values()]).nonzero()
    return list(floating)[int(found[0])] if len(found) else None


def _zeros(values: Tensor) -> Tensor:
    return values.numel() - values.count_nonzero()


def _not_finite(copies: list[Tensor], device: torch.device) -> Tensor:
    """Whether there is a NaN or infinity: both show in the extremes, and no copy of the values is made."""
    ends = [end.to(device) for values in copies if values.numel() for end in torch.aminmax(values)]
    return ~torch.isfinite(torch.stack(ends)).all() if ends else torch.zeros((), dtype=torch.bool, device=device)
