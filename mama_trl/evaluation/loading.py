"""Loads saved models and tokenizers, with errors in one sentence and no code but transformers' own unless asked."""

import json
from pathlib import Path
from typing import Any, Optional

from ..disk.folders import WEIGHT_FILES
from ..disk.paths import exists, is_dir, is_file
from ..errors import MamaError, first_line, shown

TRUST = "trust_remote_code"


def check_model_source(source: str, needs_weights: bool = True, trust_remote_code: bool = False) -> None:
    """A local model folder must have config.json, a causal language model's, and weights that fit it.

    Read from config and headers alone, in a second. Another name is taken for a hub id, of which only what the cache
    holds is checked.

    Raises:
        MamaError: the folder lacks one of them, is damaged or a file, or the name is clearly a path that is not there.
    """
    if not exists(source) and (not source.isprintable() or not 0 < len(source) < 1000):
        raise MamaError(f"{shown(source)} does not exist: give a model folder or a hub id.")
    if is_file(source):
        raise MamaError(f"{source} is a file: give the folder that `save_pretrained` wrote, or a hub id.")
    if is_dir(source):
        path = Path(source).expanduser()
        if not is_file(path / "config.json"):
            raise MamaError(f"{source} holds no config.json: give the folder that `save_pretrained` wrote.")
        if needs_weights and not any(any(path.glob(pattern)) for pattern in WEIGHT_FILES):
            raise MamaError(f"{source} holds no weights (*.safetensors): finish saving the model, or give another.")
    elif exists(source) or source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source:
        # a hub id is `name` or `owner/name`
        raise MamaError(f"{shown(source)} does not exist: give a model folder or a hub id.")
    folder = local_folder(source)
    if folder is None:
        return
    config = load_config(source, trust_remote_code)
    if trust_remote_code and hasattr(config, "auto_map"):
        return  # only its own code knows which weights it wants
    from . import weights

    if needs_weights:
        weights.check_architecture(source, config)
        weights.check_weights(source, folder, config)
    else:
        weights.check_memory(source, weights.sketch(source, config))


def local_folder(source: str) -> Optional[Path]:
    """Where the files of a model lie on this machine: its folder, or its hub id's place in the cache; else None."""
    if is_dir(source):
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(source, local_files_only=True))
    except Exception:  # not there, or no hub id at all: loading it will say so
        return None
    return folder if (folder / "config.json").is_file() and any(folder.glob("*.safetensors")) else None


def load_config(source: str, trust_remote_code: bool = False, revision: Optional[str] = None):
    """A model's configuration. Raises `MamaError` if config.json is damaged or describes nothing."""
    from transformers import AutoConfig

    if is_dir(source):
        path = Path(source).expanduser() / "config.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise MamaError(f"{path} is no readable JSON ({first_line(error)}): save the model again.") from None
        if not isinstance(stored, dict):
            raise MamaError(f"{path} is {shown(stored)}, which describes no model: save the model again.")
    options = {"revision": revision} if revision else {}
    return _loaded("config.json", source, AutoConfig.from_pretrained, trust_remote_code=trust_remote_code, **options)


def load_tokenizer(source: str, trust_remote_code: bool = False):
    """The tokenizer beside a model, with a padding token. Raises `MamaError` if there is none."""
    from transformers import AutoTokenizer

    tokenizer = _loaded("tokenizer", source, AutoTokenizer.from_pretrained, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_tokenizer(tokenizer: Any, source: str, trust_remote_code: bool = False) -> None:
    """Raises `MamaError` if a tokenizer has more tokens than its model: looking one up would fail, or worse."""
    vocabulary = vocabulary_of(load_config(source, trust_remote_code))
    special = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    # Tokens added on top may lie beyond it, if only no text has them (Gemma 3's images).
    largest = max([tokenizer.vocab_size - 1, *special])
    if vocabulary is not None and largest >= vocabulary:
        raise MamaError(
            f"the tokenizer of {source} has tokens up to {largest} and its config.json a `vocab_size` of {vocabulary}: "
            "they belong to different models; give the model's own tokenizer."
        )


def check_ids(rows: Any, source: str, trust_remote_code: bool = False) -> None:
    """Raises `MamaError` if a text has tokens that the model does not know."""
    vocabulary = vocabulary_of(load_config(source, trust_remote_code))
    if vocabulary is not None and int(rows.max()) >= vocabulary:
        raise MamaError(
            f"the text has the token {int(rows.max())}, which the model of {source} does not know (`vocab_size` is "
            f"{vocabulary}): give the model's own tokenizer."
        )


def vocabulary_of(config: Any) -> Optional[int]:
    size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def load_model(
    source: str, dtype: str = "auto", trust_remote_code: bool = False, device: Any = None,
    device_map: Optional[dict[str, Any]] = None, offload_folder: Optional[Path] = None,
):
    """A causal language model in evaluation mode.

    Args:
        device: where it is; default the GPU if there is one.
        device_map, offload_folder: as `from_pretrained` takes them: which parts stay elsewhere until they run.

    Raises:
        MamaError: nothing can be loaded, or weights are missing, left over, of another shape, NaN or infinite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from .weights import check_extent, check_report, quietly

    check_extent(source, load_config(source, trust_remote_code))
    placed: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    if offload_folder is not None:
        offload_folder.mkdir(parents=True, exist_ok=True)
        placed["offload_folder"] = str(offload_folder)
    with quietly(bars=True):
        model, report = _loaded(
            "model", source, AutoModelForCausalLM.from_pretrained, dtype=dtype, output_loading_info=True,
            trust_remote_code=trust_remote_code, **placed,
        )
    check_report(source, report)
    if device_map is None:
        model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    check_finite(source, model)
    return model.eval()


def check_finite(source: str, model: Any) -> None:
    """Raises `MamaError` for a loaded model of which a weight is NaN or infinite: whatever is measured or learned from
    it would be too."""
    from ..engines.counts import some_not_finite
    from ..engines.offload import readable_parameters

    # Weights of one byte are scaled by others, and most have no infinity.
    for part in readable_parameters(model):
        bad = some_not_finite({name: p.detach() for name, p in part.items() if p.element_size() > 1})
        if bad is not None:
            raise MamaError(
                f"{bad} of {source} holds NaN or infinity: give a model, or a checkpoint, of finite weights."
            )


def _loaded(what: str, source: str, load: Any, **options) -> Any:
    """What `load(source, **options)` gives. Raises `MamaError`, whatever it raises: files of any content go in."""
    try:
        return load(source, **options)
    except MamaError:
        raise
    except BaseException as error:
        # Rust's panics (of tokenizers) are no `Exception`s.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, ValueError) and TRUST in str(error):
            raise MamaError(
                f"{source} wants to run code of its own: read it, and give --{TRUST} (in Python {TRUST}=True) if you "
                "trust it."
            ) from None
        raise MamaError(f"no {what} can be loaded from {source}: {first_line(error)}.") from error


def sequence_length(source: str, asked: Optional[int], trust_remote_code: bool = False) -> int:
    """The asked length, or the model's context up to 2048. Raises `MamaError` beyond the context."""
    text = load_config(source, trust_remote_code).get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2048
    if not isinstance(context, int) or context < 2:
        raise MamaError(f"the config.json of {source} has {shown(context)} as `max_position_embeddings`: set it right.")
    if asked is not None and asked > context:
        raise MamaError(f"`sequence_length` is {asked}, more than the model's context of {context}: use at most that.")
    return asked or min(2048, context)
