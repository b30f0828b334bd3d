"""The one file that knows how engines store parameters.

What a rank owns of a parameter is one flat contiguous range. Everything that reads or writes a weight, a gradient
or an optimizer state during training asks a `Shard` for it, so that single process, DDP, ZeRO-1/2/3 and FSDP2 give
the same statistics and the same masks.

| engine | range | master | gradient before the step | working copies |
|---|---|---|---|---|
| single, DDP | everything | the parameter | `.grad` | none |
| FSDP2 | dim-0 slice | the local tensor | the local tensor of `.grad` | none |
| ZeRO-1, ZeRO-2 | fragment | fp32 fragment | averaged fragment | the whole 16-bit parameter on every rank |
| ZeRO-3 | padded slice | fp32 partition | averaged partition | the 16-bit partition, and the parameter while gathered |
"""

from dataclasses import dataclass
from typing import Callable, Iterable, Optional

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DimensionShard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from . import ranks
from .errors import MamaError


@dataclass(eq=False)
class Shard:
    """What this rank owns of one parameter: the flat range [start, start + length) of its full `shape`.

    This class is the view of single process and DDP, where a rank owns everything; engines override it.
    All tensors are flat, detached and share memory with the engine's own, unless a method says otherwise.
    """

    name: str
    parameter: nn.Parameter
    gathered = True  # whether the working weights are whole on this rank, so that a module runs without the others

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
    def bucket(self) -> int:
        """Shards of one bucket are updated by one call of the innermost optimizer's step."""
        return 0

    def owned(self, whole: Tensor) -> Tensor:
        """The owned range of a tensor of the full shape."""
        return whole.reshape(-1)[self.start : self.start + self.length]

    def full(self) -> Tensor:
        """A copy of the whole parameter from the masters. Collective over `group`."""
        if self.group is None:
            return self.master.detach().clone().view(self.shape)
        whole = torch.zeros(self.numel, dtype=self.master.dtype, device=self.master.device)
        whole[self.start : self.start + self.length] = self.master
        return ranks.total(whole, self.group).view(self.shape)

    def write(self, whole: Tensor) -> None:
        """Puts the same `whole` values, given on every rank, into master and working copies."""
        self.master.copy_(self.owned(whole))

    def publish(self) -> None:
        """Brings the working copies to what the masters hold. Collective over `group`."""


class TensorShard(Shard):
    """FSDP2: a DTensor split along its first dimension over one mesh dimension."""

    gathered = False

    @property
    def _extent(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        value = self.parameter
        return compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)

    @property
    def start(self) -> int:
        _, offset = self._extent
        return offset[0] * (self.numel // self.shape[0]) if self.length else self.numel

    @property
    def length(self) -> int:
        return self.master.numel()

    @property
    def group(self) -> ranks.Group:
        return self.parameter.device_mesh.get_group()

    @property
    def master(self) -> Tensor:
        return self.parameter.detach().to_local().view(-1)

    @property
    def gradient(self) -> Optional[Tensor]:
        return None if self.parameter.grad is None else self.parameter.grad.detach().to_local().view(-1)

    def optimizer_state(self, optimizer, key: str) -> Optional[Tensor]:
        inner = getattr(optimizer, "optimizer", optimizer)
        state = inner.state.get(self.parameter, {}).get(key)
        return None if state is None else state.to_local().view(-1) if isinstance(state, DTensor) else state.view(-1)


class FragmentShard(Shard):
    """ZeRO-1 and ZeRO-2: this rank's fragment of the flat fp32 group; every rank has the whole 16-bit parameter."""

    @property
    def _mapping(self):
        return self.parameter._hp_mapping  # None where this rank owns nothing

    @property
    def start(self) -> int:
        return self._mapping.lp_fragment_address.start if self._mapping is not None else self.numel

    @property
    def length(self) -> int:
        return self._mapping.lp_fragment_address.numel if self._mapping is not None else 0

    @property
    def group(self) -> ranks.Group:
        return ranks.everyone()

    @property
    def master(self) -> Tensor:
        if self._mapping is None:
            return torch.empty(0, device=self.parameter.device)
        return self._mapping.get_hp_fragment().data.view(-1)

    @property
    def gradient(self) -> Optional[Tensor]:
        if self._mapping is None:
            return torch.empty(0, device=self.parameter.device)
        fragment = self._mapping.get_lp_grad_fragment(self.parameter._index_in_param_group).reshape(-1)
        if fragment.numel() == self.numel != self.length:  # a whole accumulation buffer instead of a fragment
            fragment = self.owned(fragment)
        return fragment.to(self.master.device)

    def optimizer_state(self, optimizer, key: str) -> Optional[Tensor]:
        if self._mapping is None:
            return torch.empty(0, device=self.parameter.device)
        return (self._mapping.optim_fragment or {}).get(key)

    @property
    def bucket(self) -> int:
        return self.master.untyped_storage().data_ptr()

    @property
    def working_copies(self) -> list[Tensor]:
        return [self.parameter.data.view(-1)]

    def write(self, whole: Tensor) -> None:
        super().write(whole)
        self.parameter.data.copy_(whole.view(self.shape))

    def publish(self) -> None:
        self.parameter.data.copy_(self.full())


class PartitionShard(Shard):
    """ZeRO-3: rank r owns the r-th slice of the padded flat parameter. A frozen one has no fp32 master: its working
    partition stands for it."""

    gathered = False

    @property
    def _engine(self):
        return self.parameter._z3_optimizer

    @property
    def start(self) -> int:
        return min(ranks.rank(self.group) * self.parameter.ds_tensor.numel(), self.numel)

    @property
    def length(self) -> int:
        return min(self.numel - self.start, self.parameter.ds_tensor.numel())

    @property
    def group(self) -> ranks.Group:
        return ranks.everyone()

    @property
    def _place(self) -> tuple[int, int]:
        """Sub-group of the flat fp32 tensors and offset within it. (The engine's own getter copies when offloaded.)"""
        index, offset, _ = self._engine.grad_position[self._engine.get_param_id(self.parameter)]
        return index, offset

    @property
    def _flat(self) -> Tensor:
        return self._engine.fp32_partitioned_groups_flat[self._place[0]]

    @property
    def _partition(self) -> Tensor:
        return self.parameter.ds_tensor.data.view(-1)[: self.length]

    @property
    def master(self) -> Tensor:
        if not self.parameter.requires_grad:
            return self._partition
        return self._flat.data.narrow(0, self._place[1], self.length)

    @property
    def gradient(self) -> Optional[Tensor]:
        if not self.parameter.requires_grad:
            return None
        gradient = self._engine.get_local_fp32_grad_for_param(self.parameter)
        return None if gradient is None else gradient.reshape(-1)[: self.length].to(self.master.device)

    def optimizer_state(self, optimizer, key: str) -> Optional[Tensor]:
        if not self.parameter.requires_grad:
            return None
        state = self._engine.optimizer.state.get(self._flat, {}).get(key)
        return None if state is None else state.narrow(0, self._place[1], self.length)

    @property
    def bucket(self) -> int:
        owner = self._flat if self.parameter.requires_grad else self._partition
        return owner.untyped_storage().data_ptr()

    @property
    def working_copies(self) -> list[Tensor]:
        gathered = self.parameter.data.numel() == self.numel  # at the moment, or small enough to stay so
        return [self._partition, self.parameter.data.view(-1)] if gathered else [self._partition]

    def write(self, whole: Tensor) -> None:
        super().write(whole)
        for copy in self.working_copies:
            copy.copy_(self.owned(whole) if copy.numel() == self.length else whole.reshape(-1))

    def publish(self) -> None:
        # Whether a parameter is gathered is the same on every rank, so all take the same branch.
        copies = self.working_copies
        if len(copies) == 1:
            copies[0].copy_(self.master)
        else:
            self.write(self.full())


def shard_of(name: str, parameter: nn.Parameter) -> Shard:
    """The view of one parameter, recognised by what its engine has left on it."""
    if hasattr(parameter, "ds_id"):
        return PartitionShard(name, parameter)
    if isinstance(parameter, DTensor):
        return TensorShard(name, parameter)
    if hasattr(parameter, "_hp_mapping"):
        return FragmentShard(name, parameter)
    return Shard(name, parameter)


def shards_of(parameters: Iterable[tuple[str, nn.Parameter]]) -> list[Shard]:
    return [shard_of(name, parameter) for name, parameter in parameters]


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, also where this rank holds a part of it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def group_of(shards: list[Shard]) -> ranks.Group:
    """The ranks over which these parameters are spread; None where every rank holds all of them."""
    return shards[0].group if shards else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model under engine and `torch.compile` wrappers, whose parameter names are those on disk."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


# ---------------------------------------------------------------------- engines


def engine_of(model: nn.Module) -> str:
    """single, ddp, zero1, zero2, zero3 or fsdp2, by what the parameters really are.

    Raises `MamaError` for an engine without a view.
    """
    _refuse_unsupported(model)
    parameter = next(iter(model.parameters()))
    if hasattr(parameter, "ds_id"):
        return "zero3"
    if isinstance(parameter, DTensor):
        return "fsdp2"
    if hasattr(parameter, "_hp_mapping"):
        return "zero2" if _zero_stage() == 2 else "zero1"
    return "ddp" if ranks.everyone() is not None else "single"


def _zero_stage() -> Optional[int]:
    state = AcceleratorState._shared_state
    plugin = AcceleratorState().deepspeed_plugin if state and "deepspeed_plugins" in state else None
    return plugin.zero_stage if plugin is not None else None


def _refuse_unsupported(model: nn.Module) -> None:
    engine = AcceleratorState().distributed_type if AcceleratorState._shared_state else DistributedType.NO
    parameters = list(model.parameters())
    if any(not p.is_floating_point() for p in parameters) or getattr(model, "is_quantized", False):
        raise MamaError("the model holds quantized (8-bit or 4-bit) weights, which cannot be pruned: load it in bf16.")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise MamaError("MAMA masks need FSDP2, and this is FSDP1: set `fsdp_version: 2` in the accelerate config.")
    if engine == DistributedType.MEGATRON_LM:
        raise MamaError("MAMA masks are not supported under Megatron-LM: use --accelerate_config zero3 or fsdp2.")
    if engine == DistributedType.DEEPSPEED and not any(
        hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in parameters
    ):
        raise MamaError(
            f"MAMA masks need ZeRO stage 1, 2 or 3 under DeepSpeed, and `zero_stage` is {_zero_stage()}: set it, or "
            "launch with --accelerate_config ddp."
        )
    for parameter in parameters:
        if isinstance(parameter, DTensor) and (
            parameter.device_mesh.ndim != 1 or parameter.placements != (DimensionShard(0),)
        ):
            raise MamaError(
                "the parameters are split by tensor parallelism or hybrid sharding, which MAMA masks do not support: "
                "launch with --accelerate_config fsdp2 or zero3 on one mesh dimension."
            )
        if getattr(parameter, "ds_secondary_tensor", None) is not None:
            raise MamaError(
                "`zero_hpz_partition_size` keeps second copies of the weights, which masks do not reach: set it to 1."
            )
        if getattr(getattr(parameter, "_z3_optimizer", None), "swap_optimizer", False):
            raise MamaError("the optimizer is offloaded to NVMe, where masks do not reach: offload it to cpu instead.")


def hook_steps(optimizer, before: Callable[[], None], after: Callable[[Optional[set[int]]], None]) -> list[Callable]:
    """Calls `before` when the step's gradients are complete and `after` when the masters have moved.

    Only needed under DeepSpeed, whose engine steps inside `backward`, where the Trainer's events come too late.
    `after` gets the buckets that were updated, before DeepSpeed copies them into the working weights, so that
    what it writes reaches every copy.

    Returns:
        Functions that take the hooks away; empty where the Trainer's events serve.
    """
    zero = getattr(optimizer, "optimizer", None)
    inner = getattr(zero, "optimizer", None)
    if inner is None:
        return []
    step = zero.step

    def recorded(*args, **kwargs):
        before()
        return step(*args, **kwargs)

    zero.step = recorded

    def moved(stepped, args, kwargs):
        after({p.untyped_storage().data_ptr() for group in stepped.param_groups for p in group["params"]})

    handle = inner.register_step_post_hook(moved)

    def restore():
        zero.step = step

    return [restore, handle.remove]


def settle(model: nn.Module) -> None:
    """Under ZeRO-3: ends prefetches and frees gathered parameters, so that nobody reads what is about to change."""
    for parameter in model.parameters():
        if hasattr(parameter, "_z3_optimizer"):
            parameter._z3_optimizer.parameter_offload.get_param_coordinator().release_and_reset_all(model)
            break


def segments(shards: list[Shard]) -> list[list[tuple[Shard, int, int]]]:
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
