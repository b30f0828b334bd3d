"""Which parameters are prunable: the weights of linear layers, and of fused experts, inside the decoder blocks."""

import logging
import re
from dataclasses import dataclass
from itertools import groupby
from typing import Iterator, Mapping, Optional

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..engines.shard import full_shape
from ..errors import MamaError, warn_once
from .blocks import find_blocks
from .experts import find_routers, fused_experts, hidden_size, stored_input_first

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Target:
    """One prunable matrix.

    `name` is the parameter's name in the model's state dict, where it is found again: a head that is tied to the token
    embedding goes by the embedding's. `matrix` is always (out, in), also for GPT-2's `Conv1D`, whose `parameter` is
    stored (in, out). `block` is the decoder layer's number.

    A mixture of experts keeps the matrices of all its experts in one 3-D parameter: then `expert` is the position
    in it, `name` ends in `[expert]`, and `parameter` and `parameter_name` stand for the whole 3-D parameter.
    """

    name: str
    module_name: str
    module: nn.Module
    kind: str
    block: Optional[int]
    attribute: str = "weight"
    expert: Optional[int] = None
    transposed: bool = False  # the parameter is stored (in, out)

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.module, self.attribute)

    @property
    def parameter_name(self) -> str:
        return self.name.partition("[")[0]

    @property
    def matrix(self) -> Tensor:
        """(out, in) view of the weight: writing to it writes to the parameter."""
        return self.own(self.parameter.data)

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = full_shape(self.parameter)[-2:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def of_mixture(self) -> bool:
        """Whether this is an expert's, fused or in a list within the block, which a router may pass by."""
        numbers = sum(part.isdigit() for part in self.module_name.split("."))
        return self.expert is not None or (self.block is not None and numbers > 1)

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def bias_attribute(self) -> Optional[str]:
        """Name of the bias within `module`; of fused experts the parameter (experts, out) named after the weight."""
        if self.expert is None:
            return "bias" if getattr(self.module, "bias", None) is not None else None
        for name, parameter in self.module.named_parameters(recurse=False):
            if name.startswith(self.attribute) and parameter.shape == (self.parameter.shape[0], self.shape[0]):
                return name
        return None

    @property
    def bias(self) -> Optional[Tensor]:
        """(out,): the layer's bias parameter, or a view of the expert's row of the experts' bias; None without."""
        if self.bias_attribute is None:
            return None
        bias = getattr(self.module, self.bias_attribute)
        return bias if self.expert is None else bias.data[self.expert]

    def own(self, values: Tensor) -> Tensor:
        """(out, in) view of this target's part of a tensor in its parameter's layout."""
        return self.oriented(values if self.expert is None else values[self.expert])

    def oriented(self, values: Tensor) -> Tensor:
        """Turns a tensor between parameter layout and (out, in); its own inverse."""
        return values.t() if self.transposed else values


def find_targets(
    model: nn.Module,
    target_modules: Optional[list[str]] = None,
    exclude_modules: Optional[list[str]] = None,
    experts: bool = False,
) -> list[Target]:
    """Prunable matrices in model order.

    By default every `nn.Linear` and `Conv1D` inside a decoder block: never embeddings, norms, the output head, or
    the router of a mixture of experts. With `target_modules` every linear layer whose module name matches one of
    these regular expressions (`re.search`), wherever it stands; `exclude_modules` takes away in the same manner.

    Args:
        experts: also each expert of fused 3-D expert weights, one target an expert and matrix, in the order of the
            parameters. Without, fused experts stay dense, which is logged once.

    Raises:
        MamaError: nothing matches, or the model carries PEFT adapters (merge them first).
    """
    if hasattr(model, "peft_config"):
        raise MamaError(
            "the model carries PEFT adapters, whose base weights do not train: call merge_and_unload() first, "
            "since pruning with adapters is not supported yet."
        )
    blocks = find_blocks(model)
    number = {name: index for index, (name, _) in enumerate(blocks)}
    stored = {id(parameter): name for name, parameter in model.named_parameters()}  # the first of tied ones
    routers = find_routers(model)
    found = []
    for module_name, module in model.named_modules():
        linear = isinstance(module, (nn.Linear, Conv1D))
        fused = {} if linear else fused_experts(module)
        if not linear and not fused:
            continue
        parts = module_name.split(".")
        block = next((number[name] for i in range(1, len(parts)) if (name := ".".join(parts[:i])) in number), None)
        if target_modules is None:
            wanted = block is not None and module_name not in routers
        else:
            wanted = any(re.search(expression, module_name) for expression in target_modules)
        if any(re.search(expression, module_name) for expression in exclude_modules or []):
            wanted = False
        if not wanted:
            continue
        kind = module_name.rpartition(".")[2]
        if linear:
            name = stored.get(id(module.weight), f"{module_name}.weight")
            found.append(Target(name, module_name, module, kind, block, transposed=isinstance(module, Conv1D)))
            if name != f"{module_name}.weight":
                warn_once(logger, f"{module_name}.weight is one parameter with {name}, which is pruned with it.")
        elif experts:
            input_first = stored_input_first(module, fused, hidden_size(model))
            found += [
                Target(
                    f"{module_name}.{name}[{expert}]", module_name, module, f"{kind}.{name}", block, name, expert,
                    input_first,
                )
                for name, parameter in fused.items()
                for expert in range(parameter.shape[0])
            ]
        else:
            warn_once(logger, "fused expert weights of a mixture are not pruned here and stay dense.")
    if not found:
        raise MamaError(
            f"`target_modules` is {target_modules!r} and `exclude_modules` is {exclude_modules!r}, which leaves "
            f"nothing of {type(model).__name__} to prune: leave both out, or match names such as "
            f"{blocks[0][0]}.mlp."
        )
    _refuse_shared(found)
    return found


def _refuse_shared(targets: list[Target]) -> None:
    seen: dict[tuple, Target] = {}
    for target in targets:
        first = seen.setdefault((id(target.parameter), target.expert), target)
        if first is not target:
            raise MamaError(
                f"{target.module_name}.{target.attribute} and {first.module_name}.{first.attribute} are one tied "
                "parameter, which two masks cannot share: put one of them into `exclude_modules`."
            )


def stacked(targets: list[Target], masks: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Masks by target name, (out, in), as pairs of *parameter* name and mask in the parameter's layout, contiguous.

    An expert that has no mask stays dense.
    """
    for name, own in groupby((t for t in targets if t.name in masks), lambda target: target.parameter_name):
        whole: Optional[Tensor] = None
        for target in own:
            mask = target.oriented(masks[target.name]).contiguous()
            if target.expert is None:
                whole = mask
                continue
            if whole is None:
                whole = torch.ones(target.parameter.shape, dtype=torch.bool, device=mask.device)
            whole[target.expert] = mask
        assert whole is not None
        yield name, whole
