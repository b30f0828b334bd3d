"""Prune a saved model without training: magnitude, Wanda, SparseGPT and MAMA, block by block."""

from .prune import METHODS, prune
from .structures import STRUCTURE_METHODS, STRUCTURES, prune_structures

__all__ = ["METHODS", "STRUCTURES", "STRUCTURE_METHODS", "prune", "prune_structures"]
