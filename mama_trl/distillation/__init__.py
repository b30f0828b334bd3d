"""Distillation of a dense teacher into a pruned student."""

from .config import MamaDistillationConfig
from .trainer import MamaDistillationTrainer

__all__ = ["MamaDistillationConfig", "MamaDistillationTrainer"]
