"""What running one block by itself takes where an engine has spread the model."""

from torch import nn
from torch.distributed.fsdp import FSDPModule


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The model's class without what `fully_shard` has mixed into it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))


def release_gathered(model: nn.Module) -> None:
    """Under ZeRO-3: ends prefetches and frees gathered parameters, so that nobody reads what is about to change."""
    for parameter in model.parameters():
        if hasattr(parameter, "_z3_optimizer"):
            parameter._z3_optimizer.parameter_offload.get_param_coordinator().release_and_reset_all(model)
            break
