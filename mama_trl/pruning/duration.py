"""Roughly how long pruning will take here: multiplications counted, and this machine's speed at them measured."""

import time

import torch

from ..model.targets import Target
from ..solvers.methods import Method

SIZE = 768  # of the matrices whose product is timed
READ = 0.75  # of the calibration tokens, by methods with goals: half of them to all
EFFICIENCY = 0.8  # of that speed, which attention, norms and smaller matrices do not reach


def rough_seconds(
    targets: list[Target], method: Method, tokens: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds, right within a factor of two or so; 0 for a method that needs nothing of the inputs.

    Args:
        tokens: of all calibration sequences.
    """
    if method.needs == "nothing":
        return 0.0
    weights = sum(t.shape[0] * t.shape[1] for t in targets)
    inputs = {(t.block, t.shape[1]): t.shape[1] ** 2 for t in targets}  # layers that read one tensor share a gram
    grams = 0 if method.needs == "norm" else sum(inputs.values())
    tokens_read, streams, kinds = (READ * tokens, 3, 2) if "goal" in method.needs else (tokens, 2, 1)
    solved = sum(method.inversions * t.shape[1] ** 3 + method.products * t.shape[0] * t.shape[1] ** 2 for t in targets)
    forward = 2 * tokens_read * streams * weights
    exact = 2 * (tokens_read * kinds * grams + solved)
    return (forward / speed(dtype, device) + exact / speed(torch.float32, device)) / EFFICIENCY


def speed(dtype: torch.dtype, device: torch.device) -> float:
    """Floating point operations a second of a product of two matrices."""
    matrix = torch.randn(SIZE, SIZE, device=device).to(dtype)
    matrix @ matrix
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        (matrix @ matrix).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * SIZE**3 / best


def told(seconds: float) -> str:
    """In the unit that one would say."""
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"
