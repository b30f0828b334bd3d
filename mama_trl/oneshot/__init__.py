"""Prune a saved model without training: magnitude, Wanda, SparseGPT and MAMA, block by block."""

from .prune import METHODS, prune

__all__ = ["METHODS", "prune"]
