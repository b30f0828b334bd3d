"""GRPO that prunes by what the reward asks for."""

from .config import MamaGRPOConfig
from .trainer import MamaGRPOTrainer

__all__ = ["MamaGRPOConfig", "MamaGRPOTrainer"]
