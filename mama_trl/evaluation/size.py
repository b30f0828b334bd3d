"""Sparsity and size of a model."""

from collections import defaultdict
from pathlib import Path

from torch import nn

from ..model.targets import find_targets


def sparsity_by_matrix(model: nn.Module) -> list[dict]:
    """`name, block, kind, sparsity, size` of every prunable parameter, counted from exact zeros.

    The fused experts of a mixture are one parameter.
    """
    parameters = {target.parameter_name: target for target in find_targets(model, experts=True)}
    return [
        {
            "name": name,
            "block": target.block,
            "kind": target.kind,
            "sparsity": 1.0 - int(target.parameter.data.count_nonzero()) / target.parameter.numel(),
            "size": target.parameter.numel(),
        }
        for name, target in parameters.items()
    ]


def sparsity_by_kind(model: nn.Module) -> dict[str, float]:
    """Sparsity per kind of matrix, and `all` over all prunable matrices."""
    zeros, sizes = defaultdict(float), defaultdict(int)
    for row in sparsity_by_matrix(model):
        for key in (row["kind"], "all"):
            zeros[key] += row["sparsity"] * row["size"]
            sizes[key] += row["size"]
    return {key: zeros[key] / sizes[key] for key in sizes}


def model_bytes(folder: str | Path) -> int:
    """Bytes of the weight files in a saved model's folder."""
    return sum(path.stat().st_size for path in Path(folder).glob("model*.safetensors"))
