"""Configuration of `MamaDistillationTrainer`."""

from dataclasses import dataclass, field
from typing import Optional

from trl import SFTConfig

from ...config import MamaConfig
from ...fields import check_fields
from ..settings import RANGES, check_settings


@dataclass
class MamaDistillationConfig(MamaConfig, SFTConfig):
    """`trl.SFTConfig` with the fields of `MamaConfig`; masks are held by default (`mask_schedule="hold"`)."""

    mask_schedule: str = field(default="hold", metadata=MamaConfig.__dataclass_fields__["mask_schedule"].metadata)
    teacher_model_name_or_path: Optional[str] = field(
        default=None, metadata={"help": "Directory or hub id of the dense teacher."}
    )
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of both distributions; the loss is scaled by its square."}
    )
    cross_entropy_weight: float = field(
        default=0.0, metadata={"help": "Weight of the cross-entropy on the data beside the KL to the teacher."}
    )

    def __post_init__(self):
        MamaConfig.__post_init__(self)
        check_fields(self, MamaDistillationConfig, RANGES)
        check_settings(self, SFTConfig)
