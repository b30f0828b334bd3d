"""The recipe of `mama run`: its fields and their checks."""

from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from ..config import check_sparsity
from ..errors import MamaError

BASELINES = ("magnitude", "wanda", "sparsegpt")
STAGES = ("data", "pretrain", "sft", "grpo", "distill", "baselines", "report")


@dataclass
class DataConfig:
    """Text, tokenizer and task."""

    sequence_length: int = 256
    vocab_size: int = 1024
    characters: int = 6_000_000
    operands_from: int = 10
    operands_below: int = 50
    task_share: float = 0.5  # of the sequences in SFT and distillation
    calibration_blocks: int = 64  # half text, half task
    evaluation_blocks: int = 128


@dataclass
class RunConfig:
    """A recipe for `mama run`. `pretrain`, `sft`, `grpo` and `distill` hold the trainers' own arguments."""

    output_dir: str
    seed: int = 0
    sparsity: float = 0.8
    title: str = "MAMA demo"
    data: DataConfig = field(default_factory=DataConfig)
    model: dict = field(default_factory=dict)
    pretrain: dict = field(default_factory=dict)
    sft: dict = field(default_factory=dict)
    grpo: dict = field(default_factory=dict)
    distill: dict = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path, **overrides) -> "RunConfig":
        """From YAML; `overrides` that are None are ignored. Raises `MamaError` for unknown or missing keys."""
        path = Path(path)
        if not path.is_file():
            raise MamaError(f"`config` is {str(path)!r}, which is no file: try configs/demo.yaml.")
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise MamaError(f"{path} holds no settings: a recipe for `mama run` is a YAML mapping.")
        values.update({key: value for key, value in overrides.items() if value is not None})
        data = values.pop("data", {})
        refuse_unknown(values, cls, str(path))
        refuse_unknown(data, DataConfig, f"{path}, section data,")
        values.setdefault("output_dir", f"runs/{path.stem}")
        config = cls(**values, data=DataConfig(**data))
        check_sparsity(config.sparsity)
        return config


def refuse_unknown(values: dict, cls, where: str) -> None:
    known = [f.name for f in fields(cls)]
    for key in values:
        if key not in known:
            raise MamaError(f"{where} has the unknown key {key!r}: known are {', '.join(known)}.")
