"""Which parameters are prunable: the weights of linear layers inside the decoder blocks."""

import re
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .errors import MamaError
from .shards import full_shape


@dataclass(frozen=True, eq=False)
class Target:
    """One prunable matrix.

    `name` is the parameter's name in the model's state dict; `matrix` is always (out, in), also for
    GPT-2's `Conv1D`, whose `parameter` is stored (in, out). `block` is the decoder layer's number.
    """

    name: str
    module_name: str
    module: nn.Module
    kind: str
    block: Optional[int]

    @property
    def transposed(self) -> bool:
        return isinstance(self.module, Conv1D)

    @property
    def parameter(self) -> nn.Parameter:
        return self.module.weight

    @property
    def matrix(self) -> Tensor:
        """(out, in) view of the weight: writing to it writes to the parameter."""
        weight = self.module.weight.data
        return weight.t() if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = full_shape(self.module.weight)
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    @property
    def bias(self) -> Optional[nn.Parameter]:
        return getattr(self.module, "bias", None)

    def oriented(self, values: Tensor) -> Tensor:
        """Turns a tensor between parameter layout and (out, in); its own inverse."""
        return values.t() if self.transposed else values


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


def find_targets(
    model: nn.Module,
    target_modules: Optional[list[str]] = None,
    exclude_modules: Optional[list[str]] = None,
) -> list[Target]:
    """Prunable matrices in model order.

    By default every `nn.Linear` and `Conv1D` inside a decoder block: never embeddings, norms or the
    output head. With `target_modules` every linear layer whose module name matches one of these regular
    expressions (`re.search`), wherever it stands; `exclude_modules` takes away in the same manner.

    Raises:
        MamaError: nothing matches, or the model carries PEFT adapters (merge them first).
    """
    if hasattr(model, "peft_config"):
        raise MamaError(
            "the model carries PEFT adapters, whose base weights do not train: call merge_and_unload() first, "
            "since pruning with adapters is not supported yet."
        )
    blocks = find_blocks(model)
    found = []
    for module_name, module in model.named_modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        block = next((i for i, (name, _) in enumerate(blocks) if module_name.startswith(name + ".")), None)
        if target_modules is None:
            wanted = block is not None
        else:
            wanted = any(re.search(expression, module_name) for expression in target_modules)
        if any(re.search(expression, module_name) for expression in exclude_modules or []):
            wanted = False
        if wanted:
            kind = module_name.rpartition(".")[2]
            found.append(Target(f"{module_name}.weight", module_name, module, kind, block))
    if not found:
        raise MamaError(
            f"`target_modules` is {target_modules!r} and `exclude_modules` is {exclude_modules!r}, which leaves "
            f"nothing of {type(model).__name__} to prune: leave both out, or match names such as "
            f"{blocks[0][0]}.mlp."
        )
    _refuse_shared(found)
    return found


def _refuse_shared(targets: list[Target]) -> None:
    seen: dict[int, str] = {}
    for target in targets:
        first = seen.setdefault(id(target.parameter), target.name)
        if first != target.name:
            raise MamaError(
                f"{target.name} and {first} are one tied parameter, which two masks cannot share: put one of "
                "them into `exclude_modules`."
            )
