"""Metrics for every reporting integration, and the model card of `push_to_hub`."""

from pathlib import Path

from .callback import MamaCallback
from .card import add_to_card


class PruningCard:
    """Mixin before a TRL trainer with a `mama` callback: its model card gets the pruning section."""

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
    ours is moved to the front; and the card that `push_to_hub` writes gets the pruning section.
    """
    callbacks = trainer.callback_handler.callbacks
    callbacks.sort(key=lambda callback: not isinstance(callback, MamaCallback))
    if hasattr(trainer, "mama") or not isinstance(callbacks[0], MamaCallback):
        return
    write = trainer.create_model_card

    def create_model_card(*args, **kwargs):
        write(*args, **kwargs)
        if trainer.is_world_process_zero():
            add_to_card(Path(trainer.args.output_dir) / "README.md", callbacks[0].card())

    trainer.create_model_card = create_model_card
