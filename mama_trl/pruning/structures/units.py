"""A block's heads or neurons as groups of the inputs of one layer."""

from dataclasses import dataclass

from torch import Tensor

from ...errors import MamaError
from ...model.targets import Target

STRUCTURES = ("heads", "neurons")


@dataclass
class Unit:
    """The structures of one block, or of one expert in it: `writers` produce, group by group, what `reader` reads.

    `rows[i]` (structures, rows a structure, any number of parts) says which output rows of `writers[i]` make which
    structure.
    """

    block: int
    reader: Target
    writers: list[Target]
    rows: list[Tensor]
    size: int  # columns of the reader in a structure

    @property
    def count(self) -> int:
        return self.reader.shape[1] // self.size


def head_shape(config, name: str) -> tuple[int, int, int]:
    """(query heads, key/value heads, head_dim) of a config that has them as whole numbers."""
    heads = getattr(config, "num_attention_heads", None)
    groups = getattr(config, "num_key_value_heads", None) or heads
    if not isinstance(heads, int) or not isinstance(groups, int):
        raise MamaError(f"`pattern` is heads, but the config of {name} has no number of heads: use neurons.")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, groups, head_dim
