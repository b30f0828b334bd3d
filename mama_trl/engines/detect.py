"""Which engine holds the parameters, and what is refused."""

from typing import Iterable

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DimensionShard

from ..errors import MamaError
from . import ranks
from .fsdp2 import TensorShard
from .shard import Shard
from .zero import FragmentShard, PartitionShard, zero_stage


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


def unwrap(model: nn.Module) -> nn.Module:
    """The model under engine and `torch.compile` wrappers, whose parameter names are those on disk."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


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
        return "zero2" if zero_stage() == 2 else "zero1"
    return "ddp" if ranks.everyone() is not None else "single"


def keeps_frozen_masters(engine: str) -> bool:
    """Whether masks reach the weights of a frozen parameter, which an optimizer knows nothing of."""
    return engine in ("single", "ddp")


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
            f"MAMA masks need ZeRO stage 1, 2 or 3 under DeepSpeed, and `zero_stage` is {zero_stage()}: set it, or "
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
