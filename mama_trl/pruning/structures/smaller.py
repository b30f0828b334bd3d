"""The config of a model with fewer heads or neurons, recognised by the shapes of its state dict."""

import copy
import logging

import torch
from torch import nn

from ...errors import MamaError
from ...model.targets import Target
from ...selection.threshold import kept_count
from .units import Unit, head_shape

logger = logging.getLogger(__name__)
WIDTH_FIELDS = (
    "moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "inner_dim", "d_ff",
)


def _changed(config, **fields):
    """A copy of `config` with other fields; None if its class refuses them."""
    try:
        values = {**config.to_dict(), **fields}
        return type(config).from_dict(values)
    except Exception as error:  # each config class has its own way to refuse
        logger.debug("%s refuses %s: %s", type(config).__name__, fields, error)
        return None


def _shapes(model: nn.Module, config) -> dict[str, tuple]:
    """Shapes of the state dict of a model of `config`, nothing allocated."""
    try:
        with torch.device("meta"):
            return {name: tuple(value.shape) for name, value in type(model)(copy.deepcopy(config)).state_dict().items()}
    except Exception as error:
        logger.debug("no %s of this config: %s", type(model).__name__, error)
        return {}


@torch.no_grad()
def _runs(model: nn.Module, config) -> bool:
    """Whether one block of `config`, with random weights, can do a forward pass.

    Some architectures have shapes of their own that fit the config and do not fit each other (a norm over all heads).
    """
    depth = getattr(config, "num_hidden_layers", None)
    lists = {k: v[:1] for k, v in config.to_dict().items() if isinstance(v, list) and len(v) == depth}
    short = _changed(config, num_hidden_layers=1, vocab_size=8, pad_token_id=None, **lists)
    if short is None:
        return True  # no such model: the comparison at the end decides
    try:
        small = type(model)._from_config(short, dtype=model.dtype).eval()
    except Exception as error:
        logger.debug("no %s of one block: %s", type(model).__name__, error)
        return True
    try:
        small(input_ids=torch.zeros(1, 2, dtype=torch.int64), use_cache=False)
    except RuntimeError as error:
        logger.debug("%s of this config does not run: %s", type(model).__name__, error)
        return False
    return True


def _expected(model: nn.Module, units: list[Unit], keep: int) -> dict[str, tuple]:
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}

    def resize(target: Target, outputs: int, inputs: int) -> None:
        matrix = (inputs, outputs) if target.transposed else (outputs, inputs)
        shapes[target.parameter_name] = shapes[target.parameter_name][:-2] + matrix
        if target.bias is not None:
            name = f"{target.module_name}.{target.bias_attribute}"
            shapes[name] = shapes[name][:-1] + (outputs,)

    for unit in units:
        for target, rows in zip(unit.writers, unit.rows):
            resize(target, keep * rows.shape[1], target.shape[1])
        resize(unit.reader, unit.reader.shape[0], keep * unit.size)
    return shapes


def smaller_config(model: nn.Module, structure: str, units: list[Unit], keep: int):
    """The config of the model with `keep` structures a block, or None if no plain config describes it."""
    config = model.config
    if structure == "heads":
        heads, groups, head_dim = head_shape(config, type(model).__name__)
        fields = {"num_attention_heads": heads // groups * keep, "head_dim": head_dim}
        if hasattr(config, "num_key_value_heads"):
            fields["num_key_value_heads"] = keep
        candidates = [_changed(config, **fields)]
    else:
        candidates = [_changed(config, **{field: keep}) for field in WIDTH_FIELDS if hasattr(config, field)]
    expected = _expected(model, units, keep)
    return next((c for c in candidates if c and _shapes(model, c) == expected), None)


def nearest_describable(model, structure: str, units: list[Unit], sparsity: float):
    """(kept structures, config): the number nearest to the asked one that a plain config describes."""
    count = units[0].count
    wanted = kept_count(count, sparsity)
    reach = count if structure == "heads" else 1  # any number of neurons does, or none
    for keep in sorted(range(1, count), key=lambda keep: (abs(keep - wanted), -keep))[:reach]:
        config = smaller_config(model, structure, units, keep)
        if config is not None and _runs(model, config):
            if keep != wanted:
                logger.warning(
                    "%d of %d %s are kept in every layer, not %d: the config of %s cannot describe that number.",
                    keep, count, "key/value groups" if structure == "heads" else structure, wanted,
                    type(model).__name__,
                )
            return keep, config
    advice = "use neurons." if structure == "heads" else "use unstructured or N:M for this model."
    raise MamaError(
        f"`pattern` is {structure}, but no plain config of {type(model).__name__} describes the model with fewer of "
        f"them: {advice}"
    )
