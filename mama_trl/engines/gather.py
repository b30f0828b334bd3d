"""A model's class as it was before an engine changed it, from which one block can be built anew."""

from torch import nn
from torch.distributed.fsdp import FSDPModule


def plain_class(model: nn.Module) -> type[nn.Module]:
    """The model's class without what `fully_shard` has mixed into it."""
    return next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
