"""What each input of a layer is worth: how much of it no other input can stand in for, from a few sequences.

Taking out one connection and refitting all others of its row costs w² / [(Xᵀ X)⁻¹]_jj (optimal brain surgeon): the
`worth` of input j is that factor on w².
"""

from typing import Callable, Optional

import torch
from torch import Tensor, nn

from ..model.sequences import Sequences
from ..model.targets import Target
from ..solvers.redistribution import worth_of_inputs
from .blockwise import blockwise
from .grams import Measured
from .progress import Progress
from .source import BlocksInPlace


@torch.no_grad()
def input_worths(
    model: nn.Module,
    sequences: Sequences,
    targets: list[Target],
    batch_size: int = 8,
    source: Optional[BlocksInPlace] = None,
    add_up: Callable[[Measured], None] = lambda measured: None,
) -> dict[str, Tensor]:
    """1 / [(Xᵀ X / tokens)⁻¹]_jj on the damped gram of the dense model's inputs, (in,) fp32 by target name.

    A layer that no token reaches (an expert that was not asked) is left out.

    Args:
        source: where blocks can run; default in place.
        add_up: makes grams those of all ranks' tokens.
    """
    found: dict[str, Tensor] = {}
    for measured in blockwise(model, sequences, targets, Progress("worth", shown=False), batch_size, source):
        add_up(measured)
        shared: dict[int, Tensor] = {}  # layers that read one tensor share one gram
        for name, gram in measured.grams.items():
            if gram.tokens:
                if id(gram) not in shared:
                    shared[id(gram)] = worth_of_inputs(gram.gram / gram.tokens)
                found[name] = shared[id(gram)]
        measured.grams.clear()
    return found
