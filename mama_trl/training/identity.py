"""Which run a checkpoint belongs to: a fingerprint of settings, model and data, compared when it is resumed.

What takes effect on a resumed run and may rightly change (its length, batch sizes, accumulation, number of ranks, when
masks are computed, logging, saving, precision, hardware) is no part of it. What a checkpoint would silently override,
or what makes another experiment, is: a run that was started with other values is another run.
"""

import hashlib
import json
import math
import os
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, Optional

from datasets import Dataset
from torch import nn

from ..config import MamaConfig
from ..engines.gather import plain_class
from ..engines.shard import full_shape

_FREE = {
    "output_dir", "resume_from_checkpoint", "restore_callback_states_from_checkpoint", "do_train", "do_eval",
    "do_predict", "run_name", "project", "disable_tqdm", "debug", "local_rank", "use_cpu", "bf16", "fp16", "tf32",
    "bf16_full_eval", "fp16_full_eval", "deepspeed", "accelerator_config", "parallelism_config", "max_steps",
    "num_train_epochs", "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
    "auto_find_batch_size", "average_tokens_across_devices", "ignore_data_skip", "skip_memory_metrics",
    "load_best_model_at_end", "greater_is_better", "prediction_loss_only", "batch_eval_metrics", "label_names",
    "remove_unused_columns", "full_determinism", "enable_jit_checkpoint", "use_cache", "use_liger_kernel",
    "liger_kernel_config", "model_init_kwargs", "trust_remote_code", "padding_free", "pad_to_multiple_of",
    "dataset_num_proc", "generation_batch_size", "steps_per_generation", "ds3_gather_for_generation", "use_vllm",
    "cast_lm_head_to_fp32", "cache_implementation", "mask_start", "mask_end", "mask_interval", "inherit_masks",
    "enforce_masks",
}
_FREE_BEGINNINGS = (
    "logging", "log_", "save_", "eval_", "metric_", "hub_", "push_to_hub", "report_to", "dataloader_", "ddp_", "fsdp",
    "torch_", "gradient_checkpointing", "activation_", "include_", "trackio_", "vllm_", "num_completions_to_print",
    "use_transformers_", "transformers_continuous",
)
_SAMPLED_ROWS = 16


def identity(args: Any, config: MamaConfig, stage: str, model: nn.Module, dataloader: Any) -> dict[str, Any]:
    """The fingerprint of a run, as JSON: each setting by its name, the model's kind and size, and the training data."""
    found = {}
    for source in (args, config):
        for name in [field.name for field in fields(source)] if is_dataclass(source) else []:
            value = _plain(getattr(source, name))
            if name not in _FREE and not name.startswith(_FREE_BEGINNINGS) and value is not _UNKNOWN:
                found[name] = value
    shapes = [full_shape(parameter) for parameter in model.parameters()]
    size = sum(math.prod(shape) for shape in shapes)
    return {
        "stage": stage, "settings": found, "model": f"{plain_class(model).__name__} of {size} parameters",
        "data": _data(dataloader),
    }


def difference(stored: dict[str, Any], here: dict[str, Any]) -> Optional[str]:
    """The first thing in which two fingerprints differ, in words; None if they agree. What only one knows is no
    difference."""
    ours, theirs = here["settings"], stored.get("settings", {})
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            return f"`{name}` is {theirs[name]!r} there and {ours[name]!r} here"
    for name, what in (("model", "the model"), ("stage", "the stage"), ("data", "the training data")):
        if None not in (stored.get(name), here[name]) and stored[name] != here[name]:
            return f"{what} is {stored[name]} there and {here[name]} here"
    return None


_UNKNOWN = object()


def _plain(value: Any) -> Any:
    """A setting as JSON; `_UNKNOWN` for objects that JSON has not, such as functions."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, os.PathLike) or isinstance(value, str) and os.path.isdir(value):
        return os.path.realpath(value)
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return _UNKNOWN


def _data(dataloader: Any) -> Optional[str]:
    """The training data in words: rows and a hash of some of them; None where they cannot be looked at twice."""
    dataset = getattr(dataloader, "dataset", None)
    if not isinstance(dataset, Dataset) or not len(dataset):
        return None
    count = min(_SAMPLED_ROWS, len(dataset))
    chosen = sorted({(len(dataset) - 1) * number // max(count - 1, 1) for number in range(count)})
    found = hashlib.blake2b(digest_size=6)
    try:
        # As they lie in the table: what a format or transform makes of them may differ from look to look.
        rows = dataset.with_format("arrow")[chosen].to_pylist()
    except Exception:  # a column of a kind that has no Python value
        return None
    for row in rows:
        found.update(repr(sorted(row.items())).encode())
    return f"{len(dataset)} rows ({found.hexdigest()})"
