"""Prune a saved model without training: magnitude, Wanda, SparseGPT, ALPS and MAMA, block by block."""

from .prune import BUDGETS, METHODS, SCOPES, prune
from .structures import STRUCTURE_METHODS, STRUCTURES, prune_structures

__all__ = ["BUDGETS", "METHODS", "SCOPES", "STRUCTURES", "STRUCTURE_METHODS", "prune", "prune_structures"]
