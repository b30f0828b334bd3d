"""Configuration of `MamaDistillationTrainer`."""

from dataclasses import dataclass, field
from typing import Any, Optional

from trl import SFTConfig

from ...config import MamaConfig
from ...fields import check_fields
from ..settings import RANGES, check_settings
from ..trl_private import dict_fields


@dataclass
class MamaDistillationConfig(MamaConfig, SFTConfig):
    """`trl.SFTConfig` with the fields of `MamaConfig`; masks are held by default (`mask_schedule="hold"`)."""

    _VALID_DICT_FIELDS = [*dict_fields(SFTConfig), "teacher_model_init_kwargs"]

    mask_schedule: str = field(default="hold", metadata=MamaConfig.__dataclass_fields__["mask_schedule"].metadata)
    teacher_model_name_or_path: Optional[str] = field(
        default=None, metadata={"help": "Directory or hub id of the dense teacher."}
    )
    teacher_model_revision: Optional[str] = field(
        default=None, metadata={"help": "Revision of the teacher: a branch, a tag or a commit."}
    )
    teacher_model_init_kwargs: Optional[dict[str, Any] | str] = field(
        default=None,
        metadata={
            "help": "What the teacher is loaded with, such as '{\"dtype\": \"bfloat16\"}'; default: in the dtype that "
            "it was saved in."
        },
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
