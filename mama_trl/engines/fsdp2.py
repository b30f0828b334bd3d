"""FSDP2's view of a parameter: a DTensor split along its first dimension."""

from typing import Optional

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from . import ranks
from .shard import Shard


class TensorShard(Shard):
    """FSDP2: a DTensor split along its first dimension over one mesh dimension."""

    gathered = False
    reaches_frozen = False

    @staticmethod
    def recognises(parameter: nn.Parameter) -> bool:
        return isinstance(parameter, DTensor)

    @staticmethod
    def engine() -> str:
        return "fsdp2"

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
