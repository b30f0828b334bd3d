"""What a mixture of experts looks like: fused 3-D expert weights, and the routers beside them."""

from typing import Optional

from torch import nn


def fused_experts(module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters (experts, a, b) of a module that holds a mixture's experts, by name; else empty.

    Recognised by shape: two or more 3-D parameters of its own that agree in the number of experts.
    """
    if isinstance(module, nn.modules.conv._ConvNd):  # a convolution's kernel is 3-D as well
        return {}
    found = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3 and min(p.shape[1:]) > 1}
    return found if len(found) >= 2 and len({p.shape[0] for p in found.values()}) == 1 else {}


def stored_input_first(module: nn.Module, parameters: dict[str, nn.Parameter], hidden: Optional[int]) -> bool:
    """Whether fused experts are stored (experts, in, out): what the module says of itself, else by their shapes."""
    said = getattr(module, "is_transposed", None)  # transformers' experts interface
    if isinstance(said, bool):
        return said
    first, last = list(parameters.values())[0], list(parameters.values())[-1]
    if first.shape[1] != first.shape[2]:
        return first.shape[1] == hidden  # the first one reads the hidden states
    return last.shape[1] != last.shape[2] and last.shape[2] == hidden  # the last one writes them


def hidden_size(model: nn.Module) -> Optional[int]:
    config = getattr(model, "config", None)
    return getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "hidden_size", None)


def find_routers(model: nn.Module) -> set[str]:
    """Names of the linear layers that route tokens to experts: beside the experts, one output each (or one in all)."""
    found = set()
    for name, module in model.named_modules():
        children = dict(module.named_children())
        for child in children.values():
            fused = fused_experts(child)
            listed = isinstance(child, nn.ModuleList) and "." in name and len(child) > 1
            experts = next(iter(fused.values())).shape[0] if fused else len(child) if listed else 0
            if experts:
                found |= {
                    f"{name}.{beside}" for beside, layer in children.items()
                    if isinstance(layer, nn.Linear) and layer.out_features in (1, experts)
                }
    return found
