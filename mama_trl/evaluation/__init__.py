"""Perplexity with its protocol, tasks with verifiable answers, sparsity and size."""

from .perplexity import perplexity
from .size import model_bytes, sparsity_by_kind, sparsity_by_matrix
from .tasks import task_accuracy
from .text import blocks, read_text

__all__ = [
    "blocks", "model_bytes", "perplexity", "read_text", "sparsity_by_kind", "sparsity_by_matrix", "task_accuracy",
]
