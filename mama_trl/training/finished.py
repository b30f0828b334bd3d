"""A run that is resumed after its last step: nothing is left to do, and nothing is changed.

The Trainer cannot be told so before a step. It would train one step more, each time it is resumed; here that step moves
no weight, and is neither counted, nor logged, nor saved.
"""

import logging

from transformers import TrainerControl, TrainerState

from ..engines.zero import hold_still

logger = logging.getLogger(__name__)


def is_finished(state: TrainerState) -> bool:
    """Whether a run, as it begins, has come to its last step already."""
    return 0 < state.max_steps <= state.global_step


class Standstill:
    """Keeps a finished run as it is while the Trainer goes through one more step.

    Args:
        state: of the Trainer, as the run begins.
        optimizer: whose steps are to move nothing, until `release`.
        say: whether this rank is the one to say it.
    """

    def __init__(self, state: TrainerState, optimizer, say: bool):
        self._step, self._epoch = state.global_step, state.epoch
        self.release = hold_still(optimizer)
        if say:
            logger.warning(
                "the run is finished: step %d of %d is done, so nothing is trained and no weight is changed.",
                state.global_step, state.max_steps,
            )

    def undo(self, state: TrainerState, control: TrainerControl) -> None:
        """The void step, or the end of its epoch, is over."""
        state.global_step, state.epoch = self._step, self._epoch
        control.should_log = control.should_evaluate = control.should_save = False
        control.should_training_stop = True

    @staticmethod
    def correct(logs: dict) -> None:
        """Takes the loss of the void step, over no step at all, out of what the Trainer logs at the end."""
        if "train_loss" in logs:
            logs["train_loss"] = 0.0
