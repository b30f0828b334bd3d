"""The decoder layers of a language model."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import MamaError


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers in order: the longest `ModuleList` whose members hold two linear layers or more.

    No attribute name of any architecture is assumed. Experts of a mixture and adapters also live in
    lists, but inside a block, so the outermost list wins. Raises `MamaError` if there is none.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if best is not None and name.startswith(best[0] + "."):
            continue
        linears = sum(isinstance(child, (nn.Linear, Conv1D)) for child in module[0].modules())
        if linears >= 2 and (best is None or len(module) > len(best[1])):
            best = (name, module)
    if best is None:
        raise MamaError(
            f"{type(model).__name__} has no list of decoder layers with linear layers: only transformer "
            "language models built from repeated blocks can be pruned."
        )
    return [(f"{best[0]}.{index}", block) for index, block in enumerate(best[1])]
