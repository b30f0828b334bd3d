"""The one file that knows how engines store parameters.

Everything that reads or writes a weight, a gradient or an optimizer state during training asks for a `Shard`
here. Single process, DDP and accelerate's mixed precision keep whole parameters on each rank, so a shard is
the whole parameter; sharded engines are refused by `check_engine` until their view is written.
"""

from dataclasses import dataclass
from typing import Optional

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import MamaError


@dataclass(frozen=True, eq=False)
class Shard:
    """What this rank owns of one parameter: the flat range [start, start + length)."""

    name: str
    parameter: nn.Parameter
    start: int = 0

    @property
    def length(self) -> int:
        return self.parameter.numel()

    @property
    def master(self) -> Tensor:
        """The copy that the optimizer updates, detached, in parameter layout."""
        return self.parameter.data

    @property
    def gradient(self) -> Optional[Tensor]:
        """The averaged and accumulated gradient just before the optimizer step, or None."""
        return self.parameter.grad


def unwrap(model: nn.Module) -> nn.Module:
    """The model under DDP and `torch.compile` wrappers, whose parameter names are those on disk."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def check_engine(model: nn.Module) -> None:
    """Raises `MamaError` for an engine whose shards are not supported, or for quantized weights."""
    engine = AcceleratorState().distributed_type if AcceleratorState._shared_state else DistributedType.NO
    if engine == DistributedType.DEEPSPEED or any(hasattr(p, "ds_id") for p in model.parameters()):
        raise MamaError(
            "MAMA masks are not supported under DeepSpeed yet: launch with --accelerate_config single or ddp."
        )
    if engine == DistributedType.FSDP or any(isinstance(p.data, DTensor) for p in model.parameters()):
        raise MamaError(
            "MAMA masks are not supported under FSDP or tensor parallelism yet: launch with --accelerate_config "
            "single or ddp."
        )
    if any(not p.is_floating_point() for p in model.parameters()):
        raise MamaError("the model holds quantized (8-bit or 4-bit) weights, which cannot be pruned: load it in bf16.")


def shards_of(parameters: list[tuple[str, nn.Parameter]]) -> list[Shard]:
    return [Shard(name, parameter) for name, parameter in parameters]


def second_moment(optimizer, parameter: nn.Parameter) -> Optional[Tensor]:
    """Adam's running mean of squared gradients, in parameter layout; None for optimizers without one."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.state.get(parameter, {}).get("exp_avg_sq") if inner is not None else None


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates each rank's (n, L) rows in rank order, so that every rank sees the same.

    Ranks may have seen different amounts: all are cut to the smallest n and L among them.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return rows
    smallest = torch.tensor(rows.shape, device=rows.device)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    count, length = smallest.tolist()
    rows = rows[:count, :length].contiguous()
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows)
    return torch.cat(parts)


def broadcast_from_first(tensors: list[Tensor]) -> None:
    """Overwrites `tensors` with rank 0's, so that rounding can never let ranks drift apart."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for tensor in tensors:
            torch.distributed.broadcast(tensor, src=0)
