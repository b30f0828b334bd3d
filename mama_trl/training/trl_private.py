"""Names of TRL that are not public, all in one place; tests/test_trl_private.py says which of them a version lacks."""

from importlib import import_module
from typing import Optional

import trl

from ..errors import MamaError

# What is read or set, and where it must be found.
METRICS = "_metrics"  # SFTTrainer: {"train" | "eval": {name: [values since the last log]}}
TRAIN_TOKENS = "_total_train_tokens"  # SFTTrainer: tokens trained on so far, logged as num_tokens
LAST_LOADED = "_last_loaded_step"  # GRPOTrainer: the step whose weights the vLLM sampler has
REWARDS = "_calculate_rewards"  # GRPOTrainer: a method that gives the rewards of all ranks, by function; overridden
TAGS, NAME = "_tag_names", "_name"  # every trainer: tags and title of its model card
TP_SIZE = "_tp_size"  # SFTTrainer: how many ranks are given the same batch
DICT_FIELDS = "_VALID_DICT_FIELDS"  # SFTConfig: fields that the command line may give as JSON
AUXILIARY = ("aux_loss_enabled", "router_aux_loss_coef")  # SFTTrainer: of mixtures; public, but told nowhere
LOADER = "create_model_from_path"  # trl.trainer.utils: how every TRL trainer loads a model that it is named
USED = {
    "SFTTrainer": (METRICS, TRAIN_TOKENS, TP_SIZE, TAGS, NAME, *AUXILIARY),
    "GRPOTrainer": (LAST_LOADED, REWARDS, TAGS, NAME),
    "SFTConfig": (DICT_FIELDS,),
}


def load(source: str, **options):
    """A model, loaded as TRL's trainers load one. Raises `MamaError` if this version of TRL does it elsewhere."""
    loader = getattr(import_module("trl.trainer.utils"), LOADER, None)
    if loader is None:
        raise MamaError(
            f"TRL {trl.__version__} has no `{LOADER}` any more, so that a teacher cannot be loaded as TRL does: give a "
            "model as `teacher_model`, or use the TRL version that mama_trl names."
        )
    return loader(source, **options)


def dict_fields(config: type) -> list[str]:
    return list(getattr(config, DICT_FIELDS, []))


def _missing(trainer, name: str, consequence: str) -> MamaError:
    return MamaError(
        f"TRL {trl.__version__} has no `{name}` in its {type(trainer).__name__} any more, so that {consequence}: use "
        "the TRL version that mama_trl names."
    )


def let_sampler_load(trainer) -> None:
    """Makes TRL send the weights to its vLLM sampler before the next generation, although no step has passed.

    Raises:
        MamaError: this version of TRL would not notice, and sample from unpruned weights.
    """
    if not getattr(trainer, "use_vllm", False):
        return
    if not hasattr(trainer, LAST_LOADED):
        raise _missing(trainer, LAST_LOADED, "a vLLM sampler would answer with unpruned weights")
    setattr(trainer, LAST_LOADED, -1)


def note(trainer, mode: str, numbers: dict[str, float]) -> None:
    """Adds one batch's numbers to what the trainer averages at its next log, as `train` or `eval`."""
    for name, value in numbers.items():
        getattr(trainer, METRICS)[mode][name].append(value)


def note_tokens(trainer, mode: str, seen: Optional[int]) -> None:
    """Counts tokens trained on (None: none, in evaluation), and puts their total into the next log."""
    if seen is not None:
        setattr(trainer, TRAIN_TOKENS, getattr(trainer, TRAIN_TOKENS) + seen // getattr(trainer, TP_SIZE))
    getattr(trainer, METRICS)[mode]["num_tokens"] = [getattr(trainer, TRAIN_TOKENS)]


def tokens_seen(trainer) -> int:
    """Tokens trained on so far, over all ranks."""
    return int(getattr(trainer, TRAIN_TOKENS))
