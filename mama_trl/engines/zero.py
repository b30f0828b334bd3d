"""DeepSpeed: the views of a parameter under ZeRO-1, 2 and 3, hooks around its optimizer steps, and its settings.

DeepSpeed offers none of this to others: all of its private names that the package reads are in this file, and
tests/engines/test_private_names.py says when a new version has renamed one.
"""

from typing import Callable, Optional

import torch
from accelerate.state import AcceleratorState, is_initialized
from torch import Tensor, nn

from . import ranks
from .shard import Shard


class FragmentShard(Shard):
    """ZeRO-1 and ZeRO-2: this rank's fragment of the flat fp32 group; every rank has the whole 16-bit parameter."""

    reaches_frozen = False

    @staticmethod
    def recognises(parameter: nn.Parameter) -> bool:
        return hasattr(parameter, "_hp_mapping")

    @staticmethod
    def engine() -> str:
        return "zero2" if zero_stage() == 2 else "zero1"

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

    @property
    def saved(self) -> Tensor:
        return self.owned(self.parameter.data)

    def write(self, whole: Tensor) -> None:
        super().write(whole)
        self.parameter.data.copy_(whole.view(self.shape))

    def publish(self) -> None:
        self.parameter.data.copy_(self.full())


class PartitionShard(Shard):
    """ZeRO-3: rank r owns the r-th slice of the padded flat parameter. A frozen one has no fp32 master: its working
    partition stands for it."""

    gathered = False
    reaches_frozen = False

    @staticmethod
    def recognises(parameter: nn.Parameter) -> bool:
        return hasattr(parameter, "ds_id")

    @staticmethod
    def engine() -> str:
        return "zero3"

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

    @property
    def saved(self) -> Tensor:
        return self._partition

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


def hold_still(optimizer) -> Callable[[], None]:
    """Lets the optimizer's steps move nothing, under every engine; returns what lets them move again."""
    zero = getattr(optimizer, "optimizer", None)
    # Under DeepSpeed the engine steps its ZeRO optimizer itself, and the wrapper's own step does nothing.
    stepping = zero if getattr(zero, "optimizer", None) is not None else optimizer
    step = stepping.step
    stepping.step = lambda *args, **kwargs: None

    def release():
        stepping.step = step

    return release


def zero_stage() -> Optional[int]:
    """The stage that accelerate was configured with; None without DeepSpeed."""
    state = AcceleratorState() if is_initialized() else None
    plugin = state.deepspeed_plugin if getattr(state, "deepspeed_plugins", None) is not None else None
    return plugin.zero_stage if plugin is not None else None


def swaps_to_disk(parameter: nn.Parameter) -> bool:
    """Whether ZeRO-3 keeps this parameter's optimizer state on NVMe."""
    return getattr(getattr(parameter, "_z3_optimizer", None), "swap_optimizer", False)


def release_gathered(model: nn.Module) -> None:
    """Ends ZeRO-3's prefetches and frees gathered parameters, so that nobody reads what is about to change."""
    for parameter in model.parameters():
        if hasattr(parameter, "_z3_optimizer"):
            parameter._z3_optimizer.parameter_offload.get_param_coordinator().release_and_reset_all(model)
            break
