"""What is refused as soon as a trainer is made: before any data is prepared or any step is taken."""

import tempfile
from typing import Any, Optional

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from ..config import MamaConfig
from ..disk.paths import is_dir
from ..engines.detect import refuse_quantized, unwrap
from ..errors import MamaError, first_line
from ..evaluation.loading import check_model_source, load_config
from ..model.language import check_readable
from ..model.runner import check_walkable
from ..model.sequences import Sequences
from ..model.targets import find_targets
from ..pruning.prune import check_redistribution
from .persistence import check_limit

# Options under which other files are loaded than those of the folder's or hub id's main branch.
_ELSEWHERE = ("revision", "subfolder", "variant", "gguf_file", "config", "key_mapping", "state_dict")


def check_source(source: str, options: Any, trust_remote_code: bool) -> None:
    """Raises `MamaError` for a model's folder or hub id of which a part would be left out or drawn at random when it is
    loaded, or that is no language model.

    Vision-language models, and what `options` of `from_pretrained` look for elsewhere, are left to their own loading.
    """
    options = options if isinstance(options, dict) else {}
    if any(options.get(name) not in (None, "main") for name in _ELSEWHERE):
        return
    trust_remote_code = options.get("trust_remote_code", trust_remote_code)
    if is_dir(source):
        named = load_config(source, trust_remote_code).architectures or [""]
        if named[0] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
            return
    check_model_source(source, trust_remote_code=trust_remote_code)


def check_arguments(arguments: dict) -> None:
    """Raises `MamaError` for trainer arguments under which masks would mean nothing. Nothing is loaded for it."""
    if arguments.get("peft_config") is not None:
        raise MamaError(
            "`peft_config` is given, and pruning with adapters is not supported yet: train the full weights, or merge "
            "the adapters first."
        )
    if arguments.get("quantization_config") is not None:
        raise MamaError("`quantization_config` is given, and 8-bit or 4-bit weights cannot be pruned: load in bf16.")


def check_trainer(args, model: nn.Module, config: MamaConfig, calibration: Optional[Sequences] = None) -> None:
    """Raises `MamaError` for what a run of this model under these arguments would be refused for anyway."""
    check_limit(args)
    refuse_quantized(model)
    model = unwrap(model)
    targets = find_targets(model, config.target_modules, config.exclude_modules)
    if config.sparsity > 0 and config.mask_schedule != "hold":
        check_redistribution(config, targets)
        if config.needs_calibration:
            check_walkable(model)
    check_readable(model, calibration)
    check_saveable(model)


def check_saveable(model: nn.Module) -> None:
    """Raises `MamaError` if the model's generation config is one that `save_pretrained` refuses, which would otherwise
    come out after training, with the model lost."""
    config = getattr(model, "generation_config", None)
    if config is None or not getattr(model, "can_generate", lambda: False)():
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except ValueError as error:
            raise MamaError(
                f"`generation_config` cannot be saved, and the trained model not with it: {_reason(error)} Mend "
                "generation_config.json or model.generation_config first."
            ) from None


def _reason(error: ValueError) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip().startswith("-")]
    text = lines[0] if lines else first_line(error)
    return text if len(text) <= 140 else f"{text[:137]}..."
