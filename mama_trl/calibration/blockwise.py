"""Calibration block by block, each on the outputs of pruned blocks before it."""

from typing import Iterator, Optional

from torch import Tensor, nn

from ..engines.offload import running_device
from ..model.blocks import find_blocks
from ..model.language import call
from ..model.runner import BlockRunner, experts_one_by_one, inference
from ..model.sequences import Sequences, batches
from ..model.targets import Target
from .grams import Measured, collect
from .progress import Progress
from .source import BlocksInPlace


def blockwise(
    model: nn.Module, sequences: Sequences, targets: list[Target], progress: Progress, batch_size: int = 8,
    source: Optional[BlocksInPlace] = None,
) -> Iterator[Measured]:
    """Yields the grams of each decoder block, calibrated on the blocks before it as its taker has changed them.

    The hidden states of one block at a time are kept, in the model's dtype. Targets outside every block
    (an output head named in `target_modules`) come last, from one run of the whole changed model. To be closed
    (`contextlib.closing`) where it is not exhausted, so that the model is left as it was.

    Args:
        sequences: token ids, int64 (n, sequence_length), or 1-D tensors of any lengths.
        progress: a block that it holds is restored instead of measured.
        source: gives each block in a form that this process can run alone; default as it stands in the model.

    Raises:
        MamaError: blocks get arguments that depend on the tokens (such as embeddings per layer).
    """
    source = source if source is not None else BlocksInPlace()
    blocks = find_blocks(model)
    parts = batches(sequences, batch_size, running_device(model))
    progress.begin(len(blocks))
    with inference(model), experts_one_by_one(targets):
        runner = BlockRunner(model, blocks, source.may_stop)
        hidden = [runner.first_inputs(batch) for batch in parts]
        for index, (name, block) in enumerate(blocks):
            own = [t for t in targets if t.module_name.startswith(name + ".")]
            block, own = source.take(index, name, block, own)
            runner.put(index, block)
            if own and progress.holds(own):
                progress.restore(own)
            elif own:
                yield Measured(own, collect(block, own, lambda: [runner.run(index, states) for states in hidden]))
                progress.finish(own)
            for i, states in enumerate(hidden):
                hidden[i] = runner.run(index, states)
            source.release(index)
            progress.advance()
        hidden.clear()
        outside = [t for t in targets if t.block is None]
        yield from measured_outside(model, parts, outside, progress)


def unmeasured(
    model: nn.Module, targets: list[Target], progress: Progress, source: BlocksInPlace
) -> Iterator[Measured]:
    """Yields the targets block by block, for methods that look at weights alone; those outside every block first."""
    yield from (Measured([target], {}) for target in targets if target.block is None)
    blocks = find_blocks(model)
    progress.begin(len(blocks))
    for index, (name, block) in enumerate(blocks):
        own = [t for t in targets if t.block == index]
        block, own = source.take(index, name, block, own)
        if own and progress.holds(own):
            progress.restore(own)
        elif own:
            yield from (Measured([target], {}) for target in own)
            progress.finish(own)
        source.release(index)
        progress.advance()


def measured_outside(
    model: nn.Module, parts: list[Tensor], targets: list[Target], progress: Progress, passes: int = 0
) -> Iterator[Measured]:
    """Yields the grams of targets outside every block, from one run of the whole model; nothing if there are none.

    Args:
        passes: at least so many forward passes, where other ranks need this one's part in theirs.
    """
    if targets and progress.holds(targets):
        progress.restore(targets)
    elif targets:
        grams = collect(model, targets, lambda: [call(model, part) for part in parts])
        for _ in range(len(parts), passes):
            call(model, parts[-1])
        yield Measured(targets, grams)
        progress.finish(targets)
