"""The dense teacher: loaded as TRL's own distillation loads one, and checked against the student."""

from typing import Optional

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ...errors import MamaError, first_line
from ...evaluation.loading import check_finite
from ..checks import check_source
from ..trl_private import load
from .config import MamaDistillationConfig


def load_teacher(teacher: str | nn.Module | None, args: MamaDistillationConfig) -> nn.Module:
    """The teacher, from a folder or hub id if it is none yet: with `teacher_model_init_kwargs`, in the dtype that it
    was saved in if they name none, and with remote code only where `trust_remote_code` is set.

    Raises:
        MamaError: there is none, or it cannot be loaded, or is loaded already and has loading options; or one of its
            weights is NaN or infinite.
    """
    teacher = teacher if teacher is not None else args.teacher_model_name_or_path
    if teacher is None:
        raise MamaError("`teacher_model` is missing: give the dense model, or set `teacher_model_name_or_path` to it.")
    if not isinstance(teacher, str):
        if args.teacher_model_init_kwargs:
            raise MamaError(
                "`teacher_model_init_kwargs` is set, but `teacher_model` is loaded already, so that they would have no "
                "effect: leave them out, or give the teacher's folder."
            )
        return teacher
    options = dict(args.teacher_model_init_kwargs or {})
    options.setdefault("trust_remote_code", args.trust_remote_code)
    if args.teacher_model_revision is not None:
        options.setdefault("revision", args.teacher_model_revision)
    check_source(teacher, options, args.trust_remote_code)
    dtype = options.get("dtype")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise MamaError(f"`teacher_model_init_kwargs` has the dtype {dtype!r}: use auto, float32, bfloat16 or float16.")
    options["dtype"] = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype or "auto"
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None  # "auto" cannot be combined with several processes
    try:
        model = load(teacher, **options)
    except (OSError, ValueError, KeyError) as error:
        raise MamaError(f"`teacher_model` {teacher} cannot be loaded: {first_line(error)}") from error
    check_finite(teacher, model)
    return model


def student_config(model: str | nn.Module, args: MamaDistillationConfig):
    """The student's config before it is loaded; None where the trainer itself will say what is wrong with it."""
    if not isinstance(model, str):
        return getattr(model, "config", None)
    options = args.model_init_kwargs if isinstance(args.model_init_kwargs, dict) else {}
    try:
        return AutoConfig.from_pretrained(
            model, revision=options.get("revision"),
            trust_remote_code=options.get("trust_remote_code", args.trust_remote_code),
        )
    except (OSError, ValueError, KeyError):
        return None


def vocabulary(config) -> Optional[int]:
    """How many tokens a model knows, also one whose config is composed of several."""
    return getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "vocab_size", None)


def check_vocabulary(student, teacher: PreTrainedModel) -> None:
    """Raises `MamaError` when the models of the config `student` and the `teacher` do not predict over the same tokens,
    or the teacher predicts none."""
    if getattr(teacher, "get_output_embeddings", lambda: teacher)() is None:
        raise MamaError(
            f"`teacher_model` is a {type(teacher).__name__}, which predicts no tokens: give a causal language model."
        )
    ours, theirs = vocabulary(student), vocabulary(teacher.config)
    if ours != theirs:
        raise MamaError(
            f"`teacher_model` has a vocabulary of {theirs} tokens and the student one of {ours}: their "
            "distributions cannot be compared; choose a teacher with the student's tokenizer."
        )
