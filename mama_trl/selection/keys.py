"""Scores as integers in the same order, and back."""

import torch
from torch import Tensor


def ordered_keys(scores: Tensor) -> Tensor:
    """int32 keys, same shape, in the numeric order of the scores; not to be changed in place."""
    if scores.dtype == torch.float32:
        bits, magnitude = scores.view(torch.int32), 0x7FFFFFFF
    elif scores.dtype in (torch.bfloat16, torch.float16):
        bits, magnitude = scores.view(torch.int16).int(), 0x7FFF
    else:
        return ordered_keys(scores.float())
    if scores.device.type == "cpu" and scores.numel() and bits.min() >= 0:
        return bits  # most indicators have no sign; a look at a GPU's values would cost more than the work it saves
    # Negative floats order backwards: their key is minus the bits of their magnitude, and that of -0.0 is 0.
    sign = bits >> 31
    return (bits & magnitude).bitwise_xor_(sign).sub_(sign)


def value_of(key: int, dtype: torch.dtype) -> float:
    """Inverse of `ordered_keys` for one key."""
    integer = torch.int16 if dtype in (torch.bfloat16, torch.float16) else torch.int32
    real = dtype if integer == torch.int16 else torch.float32
    value = torch.tensor(abs(key), dtype=integer).view(real).item()
    return -value if key < 0 else value
