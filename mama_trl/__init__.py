"""Prune language models while they train: one callback or one trainer class for the Hugging Face Trainer and TRL."""

from importlib import import_module

__version__ = "0.1.0"

# Imported on first use, so that `mama --help` does not wait for torch.
_EXPORTS = {
    "MamaCallback": "training.callback",
    "MamaConfig": "config",
    "MamaDistillationConfig": "training.distillation.config",
    "MamaDistillationTrainer": "training.distillation.trainer",
    "MamaError": "errors",
    "MamaGRPOConfig": "training.grpo.config",
    "MamaGRPOTrainer": "training.grpo.trainer",
    "MaskSet": "masks.maskset",
    "load_packed": "export.packed",
    "prune": "pruning.prune",
    "prune_structures": "pruning.structures.remove",
    "save_packed": "export.packed",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
