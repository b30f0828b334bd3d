"""Types and ranges of the trainers' own settings, which TRL and transformers accept unseen and stumble over later."""

import json
import re
from contextlib import contextmanager
from dataclasses import Field, fields
from typing import Any, Iterator, Mapping, Optional, get_args, get_origin

from ..config import MamaConfig
from ..disk.paths import is_file
from ..errors import MamaError, first_line, shown
from ..fields import LARGEST, Choices, Range, check_fields, hints_of
from .schedule import Schedule

_COUNT = Range(1, LARGEST)
_NOT_NEGATIVE = Range(0)
_POSITIVE = Range(0, above=True)
_SHARE = Range(0, 1)
_BELOW_ONE = Range(0, 1, below=True)
_SEED = Range(0, 2**32 - 1)

# By field name, of any trainer's configuration. Where a field can be None, None stays allowed.
RANGES: Mapping[str, Range] = {
    **dict.fromkeys(
        (
            "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
            "eval_accumulation_steps", "max_completion_length", "num_iterations",
            "generation_batch_size", "steps_per_generation", "dataloader_prefetch_factor",
            "ddp_bucket_cap_mb", "ddp_timeout", "ref_model_sync_steps", "torch_empty_cache_steps",
            "num_generations_eval", "vllm_tensor_parallel_size", "vllm_max_model_length", "lora_r",
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            "learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "eval_delay", "beta", "epsilon",
            "epsilon_high", "entropy_coef", "cross_entropy_weight",
            "save_total_limit", "num_completions_to_print", "router_aux_loss_coef", "neftune_noise_alpha",
            "max_tool_calling_iterations",
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            "num_train_epochs", "logging_steps", "save_steps", "eval_steps", "adam_epsilon", "temperature",
            "repetition_penalty", "delta", "vllm_server_timeout",
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor", "lora_dropout"), _BELOW_ONE),
    **dict.fromkeys(
        ("min_p", "ref_model_mixup_alpha", "top_entropy_quantile", "vllm_gpu_memory_utilization"), _SHARE
    ),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "dataloader_num_workers": Range(0, 1024),
    "dataset_num_proc": Range(1, 1024),
    "test_split_size": Range(0, above=True),
    "top_k": Range(-1),
    "top_p": Range(0, 1, above=True),
    "num_generations": Range(2, LARGEST),
    "max_length": Range(2, LARGEST),  # a sequence of one token has nothing to predict
    "max_steps": Range(-1, LARGEST),
}

# Choices that TRL names in a field's help and checks only when it comes to them, after the first generation.
_TOLD = (
    "loss_type", "vllm_mode", "importance_sampling_level", "multi_objective_aggregation",
    "vllm_importance_sampling_mode", "scale_rewards",
)
_NEED_THE_MODEL = ("galore", "apollo", "lomo", "layerwise")
# What constructors raise against their arguments, also for files that are not there and packages that are missing.
_REFUSALS = (
    ValueError, TypeError, LookupError, AttributeError, AssertionError, ImportError, RuntimeError, OSError,
)
_MAPPINGS_IN_FILES = ("deepspeed", "fsdp_config", "accelerator_config")


def check_settings(config: Any, trainer_config: type) -> None:
    """Checks the fields that `trainer_config` (`trl.SFTConfig`, ...) brings into `config`, then lets it set itself up.

    Raises:
        MamaError: a type or a value that makes no sense, or what TRL itself refuses.
    """
    check_values(config, trainer_config)
    with refusals_of(trainer_config.__name__):
        trainer_config.__post_init__(config)


def check_values(values: Any, cls: type) -> None:
    """Checks, and sets right, attributes that `cls` declares as fields, before `cls` is made of them."""
    if isinstance(getattr(values, "scale_rewards", None), bool):  # TRL's older words for group and none
        values.scale_rewards = "group" if values.scale_rewards else "none"
    check_fields(values, cls, RANGES)
    for declared in fields(cls):
        value = getattr(values, declared.name, None)
        if declared.name in _TOLD:
            _check_told(declared, value)
        _check_json(cls, declared, value)
        if declared.name == "max_steps" and value == 0:
            raise MamaError("`max_steps` is 0: use at least 1, or -1 to train for `num_train_epochs`.")


@contextmanager
def refusals_of(name: str) -> Iterator[None]:
    """Within it, what another library says against its arguments becomes a `MamaError`."""
    try:
        yield
    except MamaError:
        raise
    except _REFUSALS as error:
        raise MamaError(f"{name} refuses its settings: {first_line(error)}") from error


def _check_told(declared: Field, value: Any) -> None:
    """Raises `MamaError` if a field's help does not name `value` among its choices."""
    told = re.findall(r"\b([a-z_]+)'", declared.metadata.get("help", ""))
    choices = tuple(dict.fromkeys([*told, declared.default, *declared.metadata.get("choices", ())]))
    if told and isinstance(value, str) and value not in choices:
        raise MamaError(f"`{declared.name}` is {shown(value)}: use {Choices(choices)}.")


def _check_json(cls: type, declared: Field, value: Any) -> None:
    """Raises `MamaError` if the text in a field for a mapping is none, written as JSON."""
    allowed = [get_origin(hint) or hint for hint in get_args(hints_of(cls)[declared.name])]
    if not isinstance(value, str) or dict not in allowed:
        return
    try:
        if isinstance(json.loads(value), dict):
            return
    except (ValueError, RecursionError):
        # DeepSpeed's may also be text in base 64, which it reads itself.
        encoded = declared.name == "deepspeed" and "{" not in value
        if declared.name in _MAPPINGS_IN_FILES and (is_file(value) or encoded):
            return
    raise MamaError(f"`{declared.name}` is {shown(value)}: use a mapping such as {{\"name\": 1}}.")


def check_schedule(config: MamaConfig, steps: Optional[int]) -> None:
    """Raises `MamaError` if a mask update would come after the end of a run of `steps` steps; None is not known yet."""
    if steps and steps > 0:
        Schedule.resolve(config.mask_schedule, config.sparsity, config.start, config.end, config.interval, steps)


def check_buildable(args: Any) -> None:
    """Builds what the Trainer will build of its arguments on a single number: optimizer, schedule, loggers and so on.

    Raises:
        MamaError: a package is missing, or an argument of one of them makes no sense.
    """
    import torch
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.utils import is_liger_kernel_available

    probe = torch.nn.Linear(1, 1)
    with refusals_of("the trainer"):
        if not any(kind in str(args.optim) for kind in _NEED_THE_MODEL):
            optimizer, options = Trainer.get_optimizer_cls_and_kwargs(args, probe)
            built = optimizer(probe.parameters(), **options)
            get_scheduler(
                args.lr_scheduler_type, built, 1, 10_000, scheduler_specific_kwargs=args.lr_scheduler_kwargs or {}
            )
        for callback in get_reporting_integration_callbacks(args.report_to):
            callback()
        if args.gradient_checkpointing and args.gradient_checkpointing_kwargs:
            part = torch.zeros(1, 1, requires_grad=True)
            torch.utils.checkpoint.checkpoint(probe, part, **args.gradient_checkpointing_kwargs)
        if args.torch_compile:
            torch.compile(probe, backend=args.torch_compile_backend or "inductor", mode=args.torch_compile_mode)
        if args.use_liger_kernel and not is_liger_kernel_available():
            raise ValueError("`use_liger_kernel` needs the package liger-kernel, which is not installed")
