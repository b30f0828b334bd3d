"""What a recipe says to the trainers: every stage's arguments built once, before any compute is spent."""

from dataclasses import fields
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from ..config import STATISTICS, MamaConfig
from ..disk.machine import physical_memory
from ..errors import MamaError, first_line
from ..evaluation.weights import check_memory
from ..fields import check_mapping
from ..model.fits import check_fits
from ..model.targets import find_targets
from ..pruning.prune import check_redistribution
from ..training.distillation.config import MamaDistillationConfig
from ..training.grpo.config import MamaGRPOConfig
from ..training.persistence import check_limit
from ..training.settings import RANGES, check_buildable, check_schedule, check_values, refusals_of

TRAINERS = {"pretrain": SFTConfig, "sft": SFTConfig, "grpo": MamaGRPOConfig, "distill": MamaDistillationConfig}
# What a run decides for all its stages, or what none of them can follow.
_SET_BY_THE_RUN = (
    "output_dir", "resume_from_checkpoint", "seed", "use_cpu", "dataset_kwargs", "packing", "max_length",
    "eval_strategy", "eval_on_start", "load_best_model_at_end", "push_to_hub", "model_init_kwargs", "deepspeed", "fsdp",
    "fsdp_config", "teacher_model_name_or_path", "use_vllm", "trust_remote_code", "local_rank", "do_eval", "do_predict",
)


def check_section(stage: str, given: Any) -> dict[str, Any]:
    """A stage's section as keyword arguments of its trainer's configuration.

    Raises:
        MamaError: an unknown key, one that the run sets itself, or a value that does not fit.
    """
    where = f"section {stage}"
    cls = TRAINERS[stage]
    values = check_mapping(given, cls, where, RANGES)
    for name in _SET_BY_THE_RUN:
        if name in values:
            raise MamaError(f"{where} has `{name}`, which the run sets for all its stages: leave it out.")
    if stage != "grpo" and values.get("max_steps", 0) < 1:
        raise MamaError(f"{where} has no `max_steps`, or less than 1: say how many steps the stage trains.")
    return values


def arguments(stage: str, given: dict[str, Any], **settings) -> Any:
    """A trainer's configuration of a section's values and the run's own `settings`. Raises `MamaError`."""
    cls = TRAINERS[stage]
    known = {declared.name for declared in fields(cls)}
    values = {**{name: value for name, value in settings.items() if name in known}, **given}
    try:
        probe = _Values(values)
        check_values(probe, cls)
        with refusals_of(cls.__name__):
            built = cls(**vars(probe))
        check_buildable(built)
        check_limit(built)
        if stage in ("grpo", "distill"):
            check_schedule(built, built.max_steps)
    except MamaError as error:
        raise MamaError(f"section {stage}: {error}") from None
    return built


def check_rows(stage: str, given: dict[str, Any], length: int) -> None:
    """Raises `MamaError` for more sequences than memory can hold, which is how a stage keeps all of its own."""
    steps, batch = (int(given.get(name, 8)) for name in ("max_steps", "per_device_train_batch_size"))
    if 100 * steps * batch * length > physical_memory():  # Python's lists of token ids and labels
        raise MamaError(
            f"section {stage} asks for {steps} `max_steps` of {batch} sequences, which this machine's memory does not "
            "hold: lower one of them."
        )


class _Values:
    """Settings by attribute, before a configuration is made of them."""

    def __init__(self, values: dict[str, Any]):
        self.__dict__.update(values)


def check_shape(shape: dict[str, Any], vocabulary: int) -> LlamaForCausalLM:
    """The model, built once without memory. Raises `MamaError` if it cannot be."""
    try:
        config = LlamaConfig(vocab_size=vocabulary, **shape)
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
    except Exception as error:  # transformers checks with exceptions of many kinds
        raise MamaError(f"section model describes no Llama that can be built: {first_line(error)}.") from None
    check_memory("section model", model)
    return model


def check_masks(stage: str, config: MamaConfig, sparsity: float, model: LlamaForCausalLM) -> None:
    """Raises `MamaError` for masks that a stage could not make of `model` (without memory), or the next one not hold:
    what would come out when the stages before are done."""
    try:
        if abs(config.sparsity - sparsity) > 1e-4:  # 3:7 may be written as 0.5714
            what = f"`pattern` {config.pattern}" if config.nm else "`sparsity`"
            raise MamaError(
                f"{what} prunes {config.sparsity:g}, and the run with its baselines {sparsity:g}: let the recipe's own "
                f"`sparsity` be {config.sparsity or sparsity:g}, and leave it out here."
            )
        targets = find_targets(model, config.target_modules, config.exclude_modules)
        check_fits(targets, config)
        check_redistribution(config, targets)
        if stage == "grpo":
            _check_first_masks(config)
    except MamaError as error:
        raise MamaError(f"section {stage}: {error}") from None


def _check_first_masks(config: MamaConfig) -> None:
    """What holds of GRPO, which makes the first masks: of recorded text and reward, on the run's own calibration."""
    if config.mask_schedule == "hold":
        raise MamaError("`mask_schedule` is 'hold', but no stage before has made masks: use oneshot or cubic.")
    if config.calibration_tokens is not None:
        raise MamaError(
            "`calibration_tokens` is set, but the run calibrates on `calibration_blocks` of its section data: leave it "
            "out."
        )
    there = [*MamaConfig(sparsity=0.0).recorded, "reward"]
    for name in (*config.weights, config.allocation):
        if name in STATISTICS and name not in there:
            what = "indicators" if name in config.weights else "budget"
            raise MamaError(f"`{what}` has {name}, which no stage before records: use one of {', '.join(there)}.")
