"""Metrics for every reporting integration, and the model card of `push_to_hub`."""

from pathlib import Path

from transformers import DefaultFlowCallback

from ..engines import ranks
from ..errors import MamaError
from .alone import SENTENCE
from .callback import MamaCallback
from .card import add_to_card
from .checkpoints import checkpoints, choose


class PruningCard:
    """Mixin before a TRL trainer with a `mama` callback: its model card gets the pruning section, its logs the
    sparsity, and `resume_from_checkpoint=True` means the newest *whole* checkpoint."""

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint and checkpoints(self.args.output_dir):
            asked = resume_from_checkpoint
            resume_from_checkpoint = ranks.decided(lambda: choose(self.args.output_dir, asked))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def add_callback(self, callback):
        refuse_second_in([*self.callback_handler.callbacks, callback])
        super().add_callback(callback)

    def create_model_card(self, *args, **kwargs):
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_to_card(Path(self.args.output_dir) / "README.md", self.mama.card())

    def log(self, logs: dict, *args, **kwargs):
        """The sparsity joins the Trainer's own logs, so that every reporting integration sees it."""
        if self.mama.run is not None:
            logs.update(self.mama.metrics())
        super().log(logs, *args, **kwargs)


def connect(trainer) -> None:
    """For a plain Trainer with a `MamaCallback`: metrics reach every integration, the model card tells of masks.

    A Trainer appends a user's callbacks behind W&B's and TensorBoard's, and all share one `logs` dictionary, so
    ours is moved before them (but behind the Trainer's own, which says at each step whether it is saved); and the card
    that `push_to_hub` writes gets the pruning section.
    """
    callbacks = trainer.callback_handler.callbacks
    refuse_second_in(callbacks)
    callbacks.sort(key=_place)
    ours = next((callback for callback in callbacks if isinstance(callback, MamaCallback)), None)
    if hasattr(trainer, "mama") or ours is None:
        return
    write = trainer.create_model_card

    def create_model_card(*args, **kwargs):
        write(*args, **kwargs)
        if trainer.is_world_process_zero():
            add_to_card(Path(trainer.args.output_dir) / "README.md", ours.card())

    trainer.create_model_card = create_model_card


def refuse_second_in(callbacks: list) -> None:
    """Raises `MamaError` if a list of callbacks has more than one `MamaCallback`."""
    if sum(isinstance(each, MamaCallback) or each is MamaCallback for each in callbacks) > 1:
        raise MamaError(SENTENCE)


def _place(callback) -> int:
    return 0 if isinstance(callback, DefaultFlowCallback) else 1 if isinstance(callback, MamaCallback) else 2
