"""Loads saved models and tokenizers, with errors in one sentence."""

from pathlib import Path
from typing import Optional

from ..errors import MamaError, first_line
from ..folders import WEIGHT_FILES


def check_model_source(source: str, needs_weights: bool = True) -> None:
    """A local model folder must have config.json and weights; another name is taken for a hub id.

    Raises:
        MamaError: the folder lacks one of them, is a file, or the name is clearly a path that does not exist.
    """
    path = Path(source).expanduser()
    if path.is_file():
        raise MamaError(f"{source} is a file: give the folder that `save_pretrained` wrote, or a hub id.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MamaError(f"{source} holds no config.json: give the folder that `save_pretrained` wrote.")
        if needs_weights and not any(any(path.glob(pattern)) for pattern in WEIGHT_FILES):
            raise MamaError(f"{source} holds no weights (*.safetensors): finish saving the model, or give another.")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:  # a hub id is `name` or `owner/name`
        raise MamaError(f"{source} does not exist: give a model folder or a hub id.")


def load_tokenizer(source: str):
    """The tokenizer beside a model, with a padding token. Raises `MamaError` if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise MamaError(f"no tokenizer can be loaded from {source}: {first_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, dtype: str = "auto"):
    """A causal language model in evaluation mode, on the GPU if there is one. Raises `MamaError`."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise MamaError(f"no model can be loaded from {source}: {first_line(error)}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def sequence_length(source: str, asked: Optional[int]) -> int:
    """The asked length, or the model's context up to 2048. Raises `MamaError` beyond the context."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise MamaError(f"no config.json can be loaded from {source}: {first_line(error)}") from None
    context = getattr(config, "max_position_embeddings", None) or 2048
    if asked is not None and asked > context:
        raise MamaError(f"`sequence_length` is {asked}, more than the model's context of {context}: use at most that.")
    return asked or min(2048, context)
