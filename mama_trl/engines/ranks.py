"""Collectives, the few that are needed: every function is called by all ranks of `group`.

A `group` is a process group, or None where a rank is on its own (one process, or parameters that every rank
holds whole), so that the same code serves both.
"""

import json
from typing import Callable, Optional, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from ..errors import MamaError, first_line

Decision = TypeVar("Decision")
Group = Optional["dist.ProcessGroup"]


def everyone() -> Group:
    """The group of all processes of the run; None for a single process."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else None


def size(group: Group) -> int:
    return dist.get_world_size(group) if group is not None else 1


def rank(group: Group) -> int:
    return dist.get_rank(group) if group is not None else 0


def _there(tensor: Tensor, group: Group) -> Tensor:
    """`tensor` on a device that the backend sends from: NCCL takes no CPU tensors (an offloaded optimizer's)."""
    if tensor.device.type == "cpu" and dist.get_backend(group) == "nccl":
        return tensor.to(torch.device("cuda", torch.cuda.current_device()))
    return tensor.contiguous()


def total(tensor: Tensor, group: Group) -> Tensor:
    """Sum over ranks, same shape and dtype; `tensor` itself may be overwritten."""
    if group is None:
        return tensor
    sent = _there(tensor, group)
    dist.all_reduce(sent, group=group)
    return sent.to(tensor.device)


def smallest(number: int, group: Group, device: torch.device) -> int:
    return _extreme(number, group, device, dist.ReduceOp.MIN)


def largest(number: int, group: Group, device: torch.device) -> int:
    return _extreme(number, group, device, dist.ReduceOp.MAX)


def _extreme(number: int, group: Group, device: torch.device, which) -> int:
    if group is None:
        return number
    value = _there(torch.tensor(number, device=device), group)
    dist.all_reduce(value, which, group=group)
    return int(value)


def gathered(tensor: Tensor, group: Group) -> Tensor:
    """Every rank's `tensor` (same shape everywhere), stacked along a new first dimension in rank order."""
    if group is None:
        return tensor.unsqueeze(0)
    sent = _there(tensor, group)
    parts = [torch.empty_like(sent) for _ in range(size(group))]
    dist.all_gather(parts, sent, group=group)
    return torch.stack(parts).to(tensor.device)


def from_rank(tensor: Tensor, source: int, group: Group) -> Tensor:
    """Rank `source`'s `tensor`; elsewhere its shape and dtype must be the same, and it may be overwritten."""
    if group is None:
        return tensor
    sent = _there(tensor, group)
    dist.broadcast(sent, src=dist.get_global_rank(group, source), group=group)
    return sent.to(tensor.device)


def row_from_rank(row: Tensor, source: int, group: Group) -> Tensor:
    """Rank `source`'s 1-D tensor, on every rank; each may come with one of another length."""
    if group is None:
        return row
    length = int(from_rank(torch.tensor(row.numel(), device=row.device), source, group))
    own = row if rank(group) == source else torch.empty(length, dtype=row.dtype, device=row.device)
    return from_rank(own.clone(), source, group)


def agree(digest: str, group: Group, device: torch.device) -> bool:
    """Whether every rank came with the same hexadecimal `digest` (at least 12 digits)."""
    number = torch.tensor(int(digest[:12], 16), dtype=torch.int64, device=device)
    return bool((gathered(number, group) == number).all())


def wait(group: Group) -> None:
    if group is not None:
        dist.barrier(group=group)


def decided(decide: Callable[[], Decision]) -> Decision:
    """What `decide` returns on the first rank, made of JSON values, on every rank; or the error that it raises there.

    For what depends on files, which may look different from each rank, or change between two looks. Collective over all
    processes.

    Raises:
        MamaError: on every rank, if `decide` raises it on the first; its other errors too, on the ranks that wait.
    """
    group = everyone()
    if group is None:
        return decide()
    error, answer = None, {}
    if rank(group) == 0:
        try:
            answer = {"value": decide()}
        except Exception as raised:
            error, answer = raised, {"error": str(raised) if isinstance(raised, MamaError) else first_line(raised)}
    answer = json.loads(_text_of_first(json.dumps(answer), group))
    if error is not None:
        raise error
    if "error" in answer:
        raise MamaError(answer["error"])
    return answer["value"]


def _text_of_first(text: str, group: Group) -> str:
    """The first rank's `text`, on every rank."""
    coded = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    size = int(from_rank(torch.tensor(coded.numel()), 0, group))
    coded = coded if rank(group) == 0 else torch.empty(size, dtype=torch.uint8)
    return bytes(from_rank(coded, 0, group).tolist()).decode()
