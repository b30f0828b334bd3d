"""Plain forms of what the package computes, for tests alone."""

from torch import Tensor

from mama_trl.masks.bits import unpack_bits
from mama_trl.selection.everywhere import global_packed_masks


def global_masks(scores: list[Tensor], sparsity: float, floor: float = 0.25) -> list[Tensor]:
    """`global_packed_masks` of whole matrices as bool masks; `scores` stay as they are."""
    copies = [score.float().clone() for score in scores]
    packed = global_packed_masks(copies, [score.numel() for score in scores], sparsity, floor)
    return [unpack_bits(bits, score.shape) for bits, score in zip(packed, scores)]
