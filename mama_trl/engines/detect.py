"""Recognises the engine that holds the parameters, by what it has left on them, and refuses those without a view."""

from typing import Iterable

from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import DistributedType, extract_model_from_parallel
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as DimensionShard

from ..errors import MamaError
from .fsdp2 import TensorShard
from .shard import Shard
from .zero import FragmentShard, PartitionShard, swaps_to_disk, zero_stage

# Asked in this order whether a parameter is theirs; the last one takes any.
VIEWS: list[type[Shard]] = [PartitionShard, TensorShard, FragmentShard, Shard]


def shard_of(name: str, parameter: nn.Parameter) -> Shard:
    """The view of one parameter, recognised by what its engine has left on it."""
    return next(view for view in VIEWS if view.recognises(parameter))(name, parameter)


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
    return shard_of("", next(iter(model.parameters()))).engine()


def refuse_quantized(model: nn.Module) -> None:
    """Raises `MamaError` for weights that are not floating point."""
    if any(not p.is_floating_point() for p in model.parameters()) or getattr(model, "is_quantized", False):
        raise MamaError("the model holds quantized (8-bit or 4-bit) weights, which cannot be pruned: load it in bf16.")


def _refuse_unsupported(model: nn.Module) -> None:
    refuse_quantized(model)
    engine = AcceleratorState().distributed_type if is_initialized() else DistributedType.NO
    parameters = list(model.parameters())
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise MamaError("MAMA masks need FSDP2, and this is FSDP1: set `fsdp_version: 2` in the accelerate config.")
    if engine == DistributedType.MEGATRON_LM:
        raise MamaError("MAMA masks are not supported under Megatron-LM: use --accelerate_config zero3 or fsdp2.")
    if engine == DistributedType.DEEPSPEED and not any(
        PartitionShard.recognises(p) or FragmentShard.recognises(p) for p in parameters
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
        if swaps_to_disk(parameter):
            raise MamaError("the optimizer is offloaded to NVMe, where masks do not reach: offload it to cpu instead.")
