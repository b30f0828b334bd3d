"""Calibration block by block, each on the outputs of pruned blocks before it."""

from typing import Callable, Optional

from torch import Tensor, nn

from ..model.blocks import find_blocks
from ..model.runner import BlockRunner, experts_one_by_one, inference
from ..model.targets import Target
from ..solvers.problem import Gram
from .grams import collect


def blockwise(
    model: nn.Module,
    rows: Tensor,
    targets: list[Target],
    visit: Callable[[list[Target], dict[str, Gram]], None],
    batch_size: int = 8,
    on_block: Optional[Callable[[int, int], None]] = None,
    skip: Optional[Callable[[list[Target]], bool]] = None,
) -> None:
    """Calls `visit(targets, grams)` for each decoder block, calibrated on the blocks that `visit` has changed.

    The hidden states of one block at a time are kept, in the model's dtype. Targets outside every block
    (an output head named in `target_modules`) come last, from one run of the whole changed model.

    Args:
        rows: token ids, int64 (n, sequence_length).
        on_block: progress; called with (done, total) after each block.
        skip: called with a block's targets before it is measured; True = the block is changed already (by an
            earlier run), so it is only run.

    Raises:
        MamaError: blocks get arguments that depend on the tokens (such as embeddings per layer).
    """
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    batches = rows.to(device).split(batch_size)
    with inference(model), experts_one_by_one(targets):
        calls = BlockRunner(model, blocks)
        hidden = [calls.first_inputs(batch) for batch in batches]
        for index, (name, block) in enumerate(blocks):
            own = [t for t in targets if t.module_name.startswith(name + ".")]
            if own and not (skip and skip(own)):
                visit(own, collect(block, own, lambda: [calls.run(index, states) for states in hidden]))
            for i, states in enumerate(hidden):
                hidden[i] = calls.run(index, states)
            if on_block:
                on_block(index + 1, len(blocks))
        hidden.clear()
        outside = [t for t in targets if t.block is None]
        if outside and not (skip and skip(outside)):
            visit(outside, collect(model, outside, lambda: [model(input_ids=b, use_cache=False) for b in batches]))
