"""A second model beside the one that trains, such as a teacher: put under the run's engine, without an optimizer."""

from torch import nn
from trl.models import prepare_deepspeed


def prepared(model: nn.Module, trainer) -> nn.Module:
    """`model` for inference under the engine of a Trainer: sharded under ZeRO-3, else on its device."""
    if trainer.is_deepspeed_enabled:
        return prepare_deepspeed(model, trainer.accelerator)
    return trainer.accelerator.prepare_model(model, evaluation_mode=True)
