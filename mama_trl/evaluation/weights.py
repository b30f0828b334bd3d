"""Whether the weights in a model's folder are those that its config.json describes, read from their headers alone."""

import json
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Iterator

import torch
from safetensors import safe_open
from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as their_logging

from ..disk.machine import physical_memory
from ..engines.apart import undivided
from ..errors import MamaError, first_line, shown

_MOST = 100_000  # layers, heads or experts: beyond it a model is not even sketched
_PARTS = ("layers", "layer", "heads", "head", "experts")
_SAFE, _PICKLED = "model.safetensors", "pytorch_model.bin"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}


def check_architecture(source: str, config: PretrainedConfig) -> None:
    """Raises `MamaError` if `source` is no causal language model: its head would be dropped, or drawn at random."""
    named = getattr(config, "architectures", None) or []
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _each(names)}
    if not isinstance(named, list) or named and not any(name in known for name in map(str, named)):
        raise MamaError(
            f"{source} holds a {shown(named[0] if isinstance(named, list) else named)}, which is no causal language "
            "model: give a folder whose config.json names one, such as LlamaForCausalLM."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise MamaError(f"{source} holds a {shown(config.model_type)}, of which no causal language model is known.")


def check_extent(source: str, config: PretrainedConfig) -> None:
    """Raises `MamaError` for a config of absurdly many parts, of which not even a sketch can be made."""
    waiting = [config.to_dict()]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif isinstance(value, int) and value > _MOST and str(name).endswith(_PARTS):
                raise MamaError(f"the config.json of {source} has {shown(value)} as `{name}`: use less than {_MOST}.")


def sketch(source: str, config: PretrainedConfig) -> torch.nn.Module:
    """The model that `config` describes, on the meta device. Raises `MamaError` if it describes none."""
    check_extent(source, config)
    model_class, config = _class_and_config(config)
    try:
        with quietly(), torch.device("meta"):
            return model_class(config)
    except Exception as error:  # whatever a config of any content makes a constructor say
        raise MamaError(f"the config.json of {source} describes no model: {first_line(error)}.") from None


def check_memory(source: str, model: torch.nn.Module) -> None:
    """Raises `MamaError` if a sketched model has more parameters than this machine's memory could hold in fp32."""
    wanted = 4 * sum(parameter.numel() for parameter in model.parameters())
    there = physical_memory()
    if wanted > there:
        raise MamaError(
            f"{source} describes a model of {wanted / 2**30:,.0f} GiB, and this machine has {there / 2**30:,.0f}: make "
            "it smaller."
        )


def check_weights(source: str, folder: Path, config: PretrainedConfig) -> None:
    """Loads the weights' names and shapes, without their values, into a model on the meta device.

    Transformers' own loading does it, so that what it renames, converts, ties or knows to be absent is as it will be.

    Raises:
        MamaError: a file is missing or damaged; weights are missing for the config, left over, or of another shape.
    """
    if getattr(config, "quantization_config", None) is not None:
        return  # what is stored then only its quantizer knows
    headers = _headers(folder)
    sketch(source, config)
    model_class, config = _class_and_config(config)
    try:
        with quietly(), torch.device("meta"):
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=headers, device_map={"": "meta"}, ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise MamaError(f"the weights in {source} do not fit its config.json: {first_line(error)}.") from None
    check_report(source, report)
    for name, _ in model.named_parameters():
        if name in headers and not headers[name].is_floating_point():
            raise MamaError(f"the weights in {source} hold whole numbers for {name}: save them as floating point.")
    tied = getattr(model_class, "_tied_weights_keys", None) if config.get_text_config().tie_word_embeddings else None
    for name, other in tied.items() if isinstance(tied, dict) else ():
        if name in headers and other in headers and not _equal(folder, name, other):
            raise MamaError(
                f"the weights in {source} hold a {name} of its own, which its config.json ties to {other}: set "
                "`tie_word_embeddings` to false in it, or give the weights that belong to it."
            )


def check_report(source: str, report: dict[str, Any]) -> None:
    """Raises `MamaError` naming the first weights that did not fit; `report` is `from_pretrained`'s loading info."""
    for kind, said in (
        ("missing_keys", "lack"), ("mismatched_keys", "have another shape of"), ("unexpected_keys", "hold beside it")
    ):
        names = sorted(name if isinstance(name, str) else name[0] for name in report.get(kind) or ())
        if names:
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            raise MamaError(
                f"the weights in {source} do not fit its config.json: they {said} {', '.join(names[:2])}{more}; give "
                "the config.json that they were saved with."
            )


def weight_files(folder: Path) -> list[Path]:
    """The files that `from_pretrained` would read. Raises `MamaError` if there are none, or the index lacks some."""
    for single in (_SAFE, _PICKLED):
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
                paths = [folder / name for name in names if Path(name).name == name]
            except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise MamaError(f"{index} is damaged ({first_line(error)}): save the model again.") from None
            if len(paths) != len(names) or not names:
                raise MamaError(f"{index} names files of other folders, or none: save the model again.")
            for path in paths:
                if not path.is_file():
                    raise MamaError(f"{path} is missing, which {index.name} names: restore it or save again.")
            return paths
    raise MamaError(f"{folder} holds no weights (model*.safetensors): finish saving the model, or give another.")


def _equal(folder: Path, *names: str) -> bool:
    """Whether two stored tensors hold the same numbers; yes for files that only unpickling would read."""
    found = []
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                found += [file.get_tensor(name) for name in names if name in file.keys()]
    return len(found) != len(names) or torch.equal(*found)


def _headers(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors without values, by name."""
    found: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        try:
            if path.suffix == ".bin":
                found |= torch.load(path, map_location="meta", weights_only=True)
                continue
            with safe_open(path, "pt") as file:
                for name in file.keys():
                    part = file.get_slice(name)
                    dtype = _DTYPES.get(part.get_dtype(), torch.float32)
                    found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
        except Exception as error:
            raise MamaError(
                f"{path} is no readable weights file ({first_line(error)}): save the model again, or give another."
            ) from None
    return found


def _class_and_config(config: PretrainedConfig) -> tuple[type, PretrainedConfig]:
    """What `AutoModelForCausalLM` makes a model of: of a composite config perhaps its text part."""
    model_class = next(iter(_each(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])))
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(model_class, "config_class", None) == text:
        config = config.get_text_config()
    return model_class, config


def _each(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


@contextmanager
def quietly(bars: bool = False) -> Iterator[None]:
    """Without transformers' report and (unless `bars`) bar, and without ZeRO-3 taking apart what is built."""
    verbosity, shown_before = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity(logging.CRITICAL)
    if not bars:
        their_logging.disable_progress_bar()
    try:
        with undivided():
            yield
    finally:
        their_logging.set_verbosity(verbosity)
        if shown_before:
            their_logging.enable_progress_bar()
