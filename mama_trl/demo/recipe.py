"""The recipe of `mama run`: its fields, their types and ranges. Knows nothing of torch."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

from ..config import check_sparsity
from ..disk.paths import expanded, is_file
from ..disk.yaml_files import read_settings
from ..errors import MamaError, shown
from ..fields import Count, Range, Seed, Share, check_mapping

BASELINES = ("magnitude", "wanda", "sparsegpt")
STAGES = ("data", "pretrain", "sft", "grpo", "distill", "baselines", "report")
FORMAT = "mama-run-1"  # of run.json, so that a folder is known as a run's


@dataclass
class DataConfig:
    """Text, tokenizer and task."""

    sequence_length: Annotated[int, Range(8, 65536)] = 256
    vocab_size: Annotated[int, Range(258, 1_000_000)] = 1024  # 256 bytes, padding and end at least
    characters: Annotated[int, Range(1000)] = 6_000_000
    operands_from: Annotated[int, Range(0, 4999)] = 10
    operands_below: Annotated[int, Range(2, 5000)] = 50  # sums of four digits, as many as are generated
    task_share: Share = 0.5  # of the sequences in SFT and distillation
    calibration_blocks: Annotated[int, Range(2)] = 64  # half text, half task
    evaluation_blocks: Count = 128

    def check(self, where: str) -> None:
        """Raises `MamaError` for values that do not go together."""
        if self.operands_below < self.operands_from + 2:
            raise MamaError(
                f"{where}, `operands_below` is {self.operands_below} and `operands_from` {self.operands_from}: leave "
                "at least two numbers between them, to train on and to hold out."
            )
        if self.characters < self.sequence_length * (self.calibration_blocks // 2 + 2):
            raise MamaError(
                f"{where}, `characters` is {self.characters}, too few for {self.calibration_blocks} "
                f"`calibration_blocks` of {self.sequence_length} tokens and text to train on: give more."
            )


@dataclass
class ModelShape:
    """What a recipe may say of its Llama; the rest follows from tokenizer and data."""

    hidden_size: Annotated[int, Range(1, 65536)] = 128
    intermediate_size: Annotated[int, Range(1, 262144)] = 384
    num_hidden_layers: Annotated[int, Range(1, 1024)] = 4
    num_attention_heads: Annotated[int, Range(1, 1024)] = 4
    num_key_value_heads: Annotated[int, Range(1, 1024)] = 4
    head_dim: Annotated[Optional[int], Range(2, 4096)] = None
    hidden_act: Literal["silu", "gelu", "relu", "gelu_new", "gelu_pytorch_tanh"] = "silu"
    max_position_embeddings: Annotated[Optional[int], Range(8, 1 << 20)] = None
    initializer_range: Annotated[float, Range(0, 1)] = 0.02
    rms_norm_eps: Annotated[float, Range(0, 1)] = 1e-6
    attention_bias: bool = True
    mlp_bias: bool = True
    attention_dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    tie_word_embeddings: bool = True
    rope_parameters: Optional[dict] = None

    def check(self, where: str, length: int) -> None:
        """Raises `MamaError` for a shape that no model can have."""
        for part, whole in (("num_attention_heads", "hidden_size"), ("num_key_value_heads", "num_attention_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise MamaError(
                    f"{where}, `{whole}` is {getattr(self, whole)}, no multiple of `{part}` ({getattr(self, part)}): "
                    "change one of them."
                )
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        if head % 2:
            raise MamaError(f"{where}, `head_dim` is {head}, which rotary positions cannot pair: make it even.")
        if self.max_position_embeddings is not None and self.max_position_embeddings < length:
            raise MamaError(
                f"{where}, `max_position_embeddings` is {self.max_position_embeddings}, less than the data's "
                f"`sequence_length` ({length}): raise it or leave it out."
            )


@dataclass
class RunConfig:
    """A recipe for `mama run`. `pretrain`, `sft`, `grpo` and `distill` hold the trainers' own arguments."""

    output_dir: str
    seed: Seed = 0
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
        """From YAML; `overrides` that are None are ignored.

        Raises:
            MamaError: unreadable, an unknown key, or a value that does not fit its field. What is in the stages'
                sections is checked by `demo/sections.py`, which knows the trainers.
        """
        if not is_file(path):
            raise MamaError(f"{shown(str(path))} is no file: give a recipe such as configs/demo.yaml.")
        values = read_settings(path, str(path))
        if str(values.pop("format", FORMAT)) != FORMAT:
            raise MamaError(f"{path} has a format that this version does not know: use {FORMAT}.")
        return cls.of(values, str(path), Path(path).stem, **overrides)

    @classmethod
    def of(cls, values: dict[str, Any], where: str, stem: str = "run", **overrides) -> "RunConfig":
        """From a mapping, whose place `where` names in sentences."""
        values = {**values, **{key: value for key, value in overrides.items() if value is not None}}
        sections = {name: values.pop(name, None) for name in ("data", "model")}
        for name in STAGES[1:5]:
            if values.get(name, {}) is None:
                values[name] = {}
        config = cls(**{"output_dir": f"runs/{stem}", **check_mapping(values, cls, where)})
        if config.output_dir.startswith("~"):  # which no shell has resolved in a recipe
            config.output_dir = str(expanded(config.output_dir))
        if not check_sparsity(config.sparsity):
            raise MamaError("`sparsity` is 0, which leaves a run nothing to prune: try 0.8.")
        config.data = DataConfig(**check_mapping(sections["data"], DataConfig, f"{where}, section data"))
        config.data.check(f"{where}, section data")
        config.model = check_mapping(sections["model"], ModelShape, f"{where}, section model")
        ModelShape(**config.model).check(f"{where}, section model", config.data.sequence_length)
        return config

    def settings(self) -> dict[str, Any]:
        """What run.json holds."""
        return {"format": FORMAT, **asdict(self)}

    def shape(self) -> dict[str, Any]:
        """Keyword arguments of the model's configuration."""
        shape = asdict(ModelShape(**self.model))
        shape["max_position_embeddings"] = shape["max_position_embeddings"] or 2 * self.data.sequence_length
        return {name: value for name, value in shape.items() if value is not None}
