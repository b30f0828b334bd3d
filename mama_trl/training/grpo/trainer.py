"""`MamaGRPOTrainer`: GRPO whose own backward pass says which connections earn the reward."""

from typing import Optional

from trl import GRPOConfig, GRPOTrainer

from ...model.sequences import Sequences
from ..callback import MamaCallback
from ..checks import check_arguments, check_source
from ..drop_in import config_for, signature_of
from ..integrations import PruningCard
from ..trl_private import let_sampler_load
from .config import MamaGRPOConfig
from .rewards import RewardCheck


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
        As in `trl.GRPOTrainer`, in the same order; `args` may be a `GRPOConfig`, too. By keyword:
        calibration: token ids, int64 (n, sequence_length) or 1-D tensors of any lengths, for grams; default: the newest
            prompts and completions that the policy was trained on.

    Raises:
        MamaError: adapters, or something else that masks do not go with; while training, rewards that are infinite, or
            none of which is a number.
    """

    _tag_names = ["trl", "grpo", "mama", "pruning"]

    @signature_of(GRPOTrainer)
    def __init__(self, arguments: dict, *, calibration: Optional[Sequences] = None):
        args = config_for(arguments["args"], arguments["model"], MamaGRPOConfig, GRPOConfig, "GRPO")
        check_arguments(arguments)
        if isinstance(arguments["model"], str):
            check_source(arguments["model"], args.model_init_kwargs, args.trust_remote_code)
        self.mama = RewardCallback(args, calibration, stage="grpo")
        self.mama.trainer = self
        self._reward_check = RewardCheck()
        callbacks = [self.mama, *(arguments["callbacks"] or [])]
        super().__init__(**{**arguments, "args": args, "callbacks": callbacks})
        let_sampler_load(self)  # nothing is lost by it now, and it says at once if this TRL has another way

    def _calculate_rewards(self, *args, **kwargs):
        rewards = super()._calculate_rewards(*args, **kwargs)
        self._reward_check.look(rewards, self.reward_func_names)
        return rewards


class RewardCallback(MamaCallback):
    """Records only the reward statistic, so that the trajectory of earlier stages stays as it is."""

    recorded_statistics = ("reward",)
    trainer: Optional[GRPOTrainer] = None

    def on_masks_updated(self, step: int) -> None:
        # TRL sends weights to vLLM only when its step counter moved; a mask update moves weights within a step.
        let_sampler_load(self.trainer)
