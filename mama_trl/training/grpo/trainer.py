"""`MamaGRPOTrainer`: GRPO whose own backward pass says which connections earn the reward."""

from typing import Optional

from torch import Tensor
from trl import GRPOTrainer

from ...errors import MamaError
from ...evaluation.loading import check_model_source
from ..callback import MamaCallback
from ..integrations import PruningCard
from .config import MamaGRPOConfig


class MamaGRPOTrainer(PruningCard, GRPOTrainer):
    """GRPO with pruning. What differs from `trl.GRPOTrainer`:

    - a `MamaCallback` is added that records the *reward attribution* of every connection: GRPO maximises J,
      its loss is L = −J, and to first order removing connection w changes J by w ∂L/∂w. Each optimizer step
      gives a = −w ∂L/∂w from the gradient that GRPO computed anyway, divided by its global norm; the root
      mean square of a over steps is the indicator, since the signed mean is mostly noise. A generation whose
      advantages are all zero has no gradient and is left out;
    - masks are updated on the schedule, pruned values are redistributed, and pruned connections are exactly
      zero after every step;
    - after a mask update a vLLM sampler is synced before it generates again.

    With a KL penalty, entropy bonus or auxiliary loss these share the backward pass and so the attribution.

    Args:
        args (`MamaGRPOConfig`): configuration; a plain `GRPOConfig` raises `MamaError`.
        calibration: token ids, int64 (n, sequence_length), for grams; default: the newest prompts and
            completions that the policy was trained on.
        Others as in `trl.GRPOTrainer`.
    """

    _tag_names = ["trl", "grpo", "mama", "pruning"]

    def __init__(
        self,
        model,
        reward_funcs,
        args: Optional[MamaGRPOConfig] = None,
        *,
        calibration: Optional[Tensor] = None,
        **kwargs,
    ):
        args = args if args is not None else MamaGRPOConfig()
        if not isinstance(args, MamaGRPOConfig):
            raise MamaError(f"`args` is a {type(args).__name__}: MamaGRPOTrainer takes a MamaGRPOConfig.")
        if isinstance(model, str):
            check_model_source(model, trust_remote_code=args.trust_remote_code)
        self.mama = RewardCallback(args, calibration, stage="grpo")
        super().__init__(model, reward_funcs, args=args, **kwargs)
        self.mama.trainer = self
        self.add_callback(self.mama)


class RewardCallback(MamaCallback):
    """Records only the reward statistic, so that the trajectory of earlier stages stays as it is."""

    recorded_statistics = ("reward",)
    trainer: Optional[GRPOTrainer] = None

    def on_masks_updated(self, step: int) -> None:
        # TRL sends weights to vLLM only when its step counter moved; a mask update moves weights within a step.
        if getattr(self.trainer, "use_vllm", False):
            self.trainer._last_loaded_step = -1
