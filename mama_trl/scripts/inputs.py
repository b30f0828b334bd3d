"""Which files and folders a training command reads, so that it writes over none of them."""

import importlib.util
import os
import sys
from typing import Any, Optional


def inputs_of(script_args, training_args, model_args, dataset_args) -> dict[str, Any]:
    """Names of what is read, by what it is; what is no file or folder (a hub id, None) stands among them."""
    found = {
        "the model": model_args.model_name_or_path,
        "the teacher": getattr(training_args, "teacher_model_name_or_path", None),
        "the dataset": script_args.dataset_name,
        "the config file": getattr(script_args, "config_file", None),
        "the chat template": getattr(training_args, "chat_template_path", None),
    }
    for name in ("deepspeed", "fsdp_config"):
        value = getattr(training_args, name, None)
        if isinstance(value, str):
            found["the engine's config"] = value
    for number, part in enumerate(dataset_args.datasets or [], 1):
        for kind in ("path", "data_dir", "data_files"):
            for index, name in enumerate(_each(getattr(part, kind, None)), 1):
                found[f"dataset {number} ({kind} {index})"] = name
    for name in getattr(script_args, "reward_funcs", None) or []:
        found[f"reward {name}"] = _module_file(name)
    return found


def _each(value: Any) -> list:
    """One name, or those in a list or mapping."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [name for item in value for name in _each(item)]
    return [] if value is None else [value]


def _module_file(name: str) -> Optional[str]:
    """The file of the module that a dotted path to a reward begins with; None if there is none."""
    top = name.partition(".")[0]
    if not top or top == name:
        return None
    path = list(sys.path)
    try:
        sys.path.insert(0, os.getcwd())
        spec = importlib.util.find_spec(top)
        return spec.origin if spec is not None else None
    except (ImportError, ValueError, AttributeError):
        return None
    finally:
        sys.path[:] = path
