"""Prune language models while they train: one callback or one trainer class for the Hugging Face Trainer and TRL."""

from importlib import import_module

__version__ = "0.1.0"

# Imported on first use, so that `mama --help` does not wait for torch.
_EXPORTS = {
    "MamaCallback": "callback",
    "MamaConfig": "config",
    "MamaDistillationConfig": "distillation",
    "MamaDistillationTrainer": "distillation",
    "MamaError": "errors",
    "MamaGRPOConfig": "grpo",
    "MamaGRPOTrainer": "grpo",
    "MaskSet": "masks",
    "prune": "oneshot",
    "prune_structures": "oneshot",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
