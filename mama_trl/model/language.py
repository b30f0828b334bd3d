"""Where the language model is within a model: its token embedding, what it was made for, and how it is called."""

import inspect
from typing import Optional

import torch
from torch import Tensor, nn

from ..errors import MamaError
from .sequences import Sequences

# Names under which configs keep how many positions a model has.
_CONTEXTS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")
_PLACEHOLDERS = ("image", "video", "audio")


def text_config(model: nn.Module):
    """The config of the language model, within a composite one where it is that; None for a plain module."""
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def token_embedding(model: nn.Module) -> Optional[nn.Module]:
    """The module that turns token ids into hidden states, as the model says, or the first one inside of it that reads
    text and says so; None if none does."""
    for module in model.modules():
        getter = getattr(module, "get_input_embeddings", None)
        if getter is None or not reads_text(module):
            continue
        try:
            found = getter()
        except (NotImplementedError, AttributeError):
            continue
        if isinstance(found, nn.Module):
            return found
    return None


def path_to(model: nn.Module, module: nn.Module) -> list[nn.Module]:
    """The modules from `model` down to the one that holds `module`; [model] if it is not in there."""
    name = next((name for name, each in model.named_modules() if each is module), "")
    parts = name.split(".")[:-1]
    return [model] + [model.get_submodule(".".join(parts[: i + 1])) for i in range(len(parts))]


def is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def reads_text(module: nn.Module) -> bool:
    """False for a tower of transformers' that reads images or sound; True where nothing says so."""
    modalities = getattr(module, "input_modalities", None)
    if modalities is not None:
        return "text" in ((modalities,) if isinstance(modalities, str) else modalities)
    return getattr(module, "main_input_name", "input_ids") in ("input_ids", "inputs")


def context_length(model: nn.Module) -> Optional[int]:
    """How many positions the language model has; None where its config names no limit."""
    config = text_config(model)
    found = [getattr(config, name, None) for name in _CONTEXTS]
    return next((int(value) for value in found if isinstance(value, int) and value > 0), None)


def learned_positions(model: nn.Module) -> Optional[int]:
    """How many positions a model has learned embeddings for, beyond which it cannot read; None if it has none."""
    context, token = context_length(model), token_embedding(model)
    tables = [each for each in model.modules() if isinstance(each, nn.Embedding) and each is not token]
    found = context is not None and any(context <= table.num_embeddings <= context + 4 for table in tables)
    return context if found else None


def check_readable(model: nn.Module, sequences: Optional[Sequences]) -> None:
    """Raises `MamaError` for calibration sequences that the model cannot read: tokens or positions that it lacks."""
    rows = [] if sequences is None else [sequences] if isinstance(sequences, Tensor) else sequences
    tokens, positions = getattr(token_embedding(model), "num_embeddings", None), learned_positions(model)
    for row in rows:
        if tokens is not None and not 0 <= int(row.min()) <= int(row.max()) < tokens:
            bad = int(row.min()) if int(row.min()) < 0 else int(row.max())
            raise MamaError(
                f"`calibration` has the token {bad}, and the model knows {tokens}: encode it with its own tokenizer."
            )
        if positions is not None and row.shape[-1] > positions:
            raise MamaError(
                f"`calibration` has sequences of {row.shape[-1]} tokens, more than the model's {positions} positions: "
                "cut them."
            )


def placeholder_ids(model: nn.Module) -> list[int]:
    """Token ids that stand for an image, a video or a sound, whose embedding is something else in the real input."""
    config = getattr(model, "config", None)
    names = [f"{kind}_token_{end}" for kind in _PLACEHOLDERS for end in ("id", "index")]
    found = [getattr(config, name, None) for name in names]
    return sorted({value for value in found if isinstance(value, int) and value >= 0})


def call(model: nn.Module, ids: Tensor):
    """What `model` returns for token ids (n, sequence_length), whatever else its forward takes.

    Raises:
        MamaError: its forward wants more than token ids (and labels).
    """
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    first = next(
        (name for name, p in parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)), None
    )
    own = "input_ids" if "input_ids" in parameters or (open_ended and first is None) else first
    given = {"input_ids": ids} if own == "input_ids" else {}
    if "use_cache" in parameters or (open_ended and "input_ids" in parameters):
        given["use_cache"] = False
    needed = [
        name for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name not in (own, *given)
    ]
    if "labels" in needed:
        given["labels"] = ids
    missing = [name for name in needed if name != "labels"]
    if own is None or missing:
        raise MamaError(
            f"{type(model).__name__}.forward wants {', '.join(missing) or 'no token ids'}, so that it cannot be run on "
            "calibration tokens: give them defaults, or set `indicators` to magnitude and `redistribution` to none."
        )
    return model(**given) if own == "input_ids" else model(ids, **given)


def logits_of(output) -> Tensor:
    """The logits (n, sequence_length, vocabulary) in what a model returned. Raises `MamaError` if there are none."""
    if isinstance(output, dict):  # transformers' outputs too
        output = output.get("logits")
    elif isinstance(output, (tuple, list)):
        output = next((item for item in output if isinstance(item, Tensor) and item.dim() == 3), None)
    if not isinstance(output, Tensor) or output.dim() != 3:
        raise MamaError(
            "the model returns no logits (n, sequence_length, vocabulary), which its loss is computed from here: "
            "return them as `logits`."
        )
    return output


def ids_in(module: nn.Module, args: tuple, kwargs: dict) -> Optional[Tensor]:
    """The token ids (n, sequence_length) among a call's arguments, `input_ids` or the first; None if there are none."""
    found = kwargs.get("input_ids", args[0] if args else None)
    if found is None and kwargs:  # a plain module may call them what it likes
        found = next(iter(kwargs.values()))
    whole = isinstance(found, Tensor) and found.dtype in (torch.int64, torch.int32) and found.dim() == 2
    return found if whole else None
