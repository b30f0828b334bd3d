"""The names that a run writes into its folder: what it may delete again."""

from ..disk.folders import LOCK
from ..disk.removal import MODEL_NAMES, Names
from .recipe import BASELINES

RUN_FILE, STAGE_FILE = "run.json", "stage.json"
PICTURES = (
    "sparsity_and_reward.png", "against_baselines.png", "sparsity_map.png", "attribution.png", "trajectory.png",
    "distillation.png",
)
_STAGE: Names = {
    **MODEL_NAMES, STAGE_FILE: None, "rows.safetensors": None,
    "packed": {"model.safetensors": None, ".*.tmp": None},
}
RUN_NAMES: Names = {
    **dict.fromkeys((RUN_FILE, "report.json", "report.html", *PICTURES, LOCK, ".*.tmp")),
    **{stage: _STAGE for stage in ("data", "pretrain", "sft", "grpo", "model")},
    "baselines": {**_STAGE, **{method: MODEL_NAMES for method in BASELINES}},
}
