"""The decoder layers of a language model."""

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import MamaError
from .language import is_encoder_decoder, path_to, reads_text, token_embedding


def find_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The decoder layers in order: the longest `ModuleList`, near the token embedding, of blocks with linear layers.

    No attribute name of any architecture is assumed. A block holds two linear layers or more. Experts of a mixture and
    adapters also live in lists, but inside a block, so an outermost list wins. The innermost module that holds both the
    token embedding and such a list is the language model: the towers of a vision-language model stand beside it, and
    those that say they read images or sound are left out anyway. An encoder-decoder has two lists, the encoder's first.

    Raises:
        MamaError: there is none.
    """
    lists = {name: found for name, found in _outermost_lists(model).items() if not _in_tower(model, name)}
    if is_encoder_decoder(model):
        chosen = list(lists)
    else:
        chosen = _nearest(model, lists)
        chosen = sorted(chosen, key=lambda name: -len(lists[name]))[:1]  # the first of the longest
    if not chosen:
        raise MamaError(
            f"{type(model).__name__} has no list of decoder layers with linear layers: only transformer "
            "language models built from repeated blocks can be pruned."
        )
    return [(f"{name}.{index}", block) for name in chosen for index, block in enumerate(lists[name])]


def _outermost_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of blocks with two linear layers or more, none within another, by name."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if any(name.startswith(f"{outer}.") for outer in found):
            continue
        if sum(isinstance(child, (nn.Linear, Conv1D)) for child in module[0].modules()) >= 2:
            found[name] = module
    return found


def _in_tower(model: nn.Module, name: str) -> bool:
    """Whether a module lies within one that reads images or sound and no text."""
    parts = name.split(".")
    return any(not reads_text(model.get_submodule(".".join(parts[:i]))) for i in range(1, len(parts)))


def _nearest(model: nn.Module, lists: dict[str, nn.ModuleList]) -> list[str]:
    """The lists within the innermost module that also holds the token embedding; all where there is no embedding."""
    embedding = token_embedding(model)
    for ancestor in reversed(path_to(model, embedding) if embedding is not None else []):
        inside = {id(module) for module in ancestor.modules()}
        near = [name for name, found in lists.items() if id(found) in inside]
        if near:
            return near
    return list(lists)
