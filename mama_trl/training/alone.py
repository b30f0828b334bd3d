"""One `MamaCallback` in a trainer: two would hold masks against each other on the same weights."""

from ..errors import MamaError

SENTENCE = (
    "`callbacks` has two MamaCallbacks, which would hold masks against each other: leave one out (MamaGRPOTrainer and "
    "MamaDistillationTrainer have their own, `trainer.mama`)."
)


def refuse_second(state, event: str) -> None:
    """Raises `MamaError` if a `MamaCallback` has seen this `event` of this trainer already.

    Args:
        state: the Trainer's, made anew for every training, and handed to each of its callbacks.
    """
    mark = f"_mama_{event}"
    if mark in vars(state):
        raise MamaError(SENTENCE)
    vars(state)[mark] = True
