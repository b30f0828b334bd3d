"""What pruning each matrix alone costs, measured: the divergence from the dense model at some sparsities.

No formula is believed: each matrix is pruned as the method prunes, everything else stays dense, and the model is run
from that block on to its outputs on a few sequences. That is a solve and part of a forward pass for each matrix and
each sparsity, so it takes many times as long as predicting (`predicted` in selection/allocation.py); grams come from
one walk through the dense blocks, and nothing before a block is run again.
"""

from contextlib import ExitStack, closing, contextmanager
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..engines.offload import running_device
from ..model.blocks import find_blocks
from ..model.language import call
from ..model.runner import computing, inference
from ..model.sequences import Sequences, batches, spread_evenly
from ..model.targets import Target
from ..selection.allocation import BINS, curve_histogram
from ..solvers.problem import Gram, Solution
from .blockwise import blockwise
from .progress import Progress
from .source import FetchedBlocks

FACTORS = (0.1, 0.4, 0.7, 1.0, 1.4, 2.0)  # of the density that is wanted over all: where each matrix is measured
LENGTH = 256  # tokens of a sequence that the divergence is measured on
MOST_LOGITS = 1 << 26  # of the dense model, kept in its dtype to compare with
SEQUENCES = 8  # at most, to measure the divergence on


@torch.no_grad()
def measured_losses(
    model: nn.Module,
    sequences: Sequences,
    targets: list[Target],
    sparsity: float,
    solve: Callable[[Target, Gram, float], Solution],
    batch_size: int = 8,
    progress: bool = False,
) -> Tensor:
    """How many connections of each matrix have which measured loss, int32 (matrices, bins): see `shares_by_loss`.

    Targets outside every block, and those that no token reached, have zeros.

    Args:
        sequences: calibration sequences; a quarter of them makes the grams.
        sparsity: that is going to be shared.
        solve: prunes one matrix to a sparsity, given the gram of its inputs.
    """
    device = running_device(model)
    wanted = sorted({min(factor * (1 - sparsity), 0.999) for factor in FACTORS})
    found = {target.name: torch.zeros(BINS, dtype=torch.int32) for target in targets}
    few = spread_evenly(sequences, -(-len(sequences) // 4))
    parts = [part[:, :LENGTH] for part in batches(spread_evenly(sequences, SEQUENCES), 1, device)]
    walk = blockwise(model, few, targets, Progress("budget", shown=False), batch_size, FetchedBlocks())
    with inference(model), closing(walk), tqdm(
        total=len(targets) * len(wanted), desc="budget", unit="solve", disable=not progress, leave=False
    ) as bar:
        tail = _Tail(model, parts)
        for measured in walk:
            for target in measured.targets:
                inputs = measured.grams[target.name]
                if target.block is not None and inputs.tokens:
                    tail.advance(target.block)
                    losses = [_alone(target, solve(target, inputs, 1 - density), tail) for density in wanted]
                    found[target.name] = curve_histogram(wanted, losses, target.shape[0] * target.shape[1])
                bar.update(len(wanted))
            measured.grams.clear()
    return torch.stack([found[target.name] for target in targets])


def _alone(target: Target, solution: Solution, tail: "_Tail") -> float:
    """The divergence with this matrix alone pruned; it is put back."""
    weight, bias = target.matrix.clone(), None if target.bias is None else target.bias.detach().clone()
    target.matrix.copy_(solution.weight)
    if solution.bias is not None:
        target.bias.data.copy_(solution.bias)
    try:
        return tail.divergence()
    finally:
        target.matrix.copy_(weight)
        if bias is not None:
            target.bias.data.copy_(bias)


class _Tail:
    """Runs the model from one block on, from hidden states of the dense model that are kept.

    Args:
        parts: token ids (1, tokens); those beyond `MOST_LOGITS` are left out.
    """

    def __init__(self, model: nn.Module, parts: list[Tensor]):
        self._model, self._blocks = model, [block for _, block in find_blocks(model)]
        self._at = 0
        self._parts: list[Tensor] = []
        self._states: list[Tensor] = []
        self._dense: list[Tensor] = []
        held = 0
        for part in parts:
            with self._noting(0, self._states):
                logits = call(model, part).logits
            held += logits.numel()
            if self._dense and held > MOST_LOGITS:
                self._states.pop()
                break
            self._parts.append(part)
            self._dense.append(logits)

    def divergence(self) -> float:
        """Mean KL(dense ‖ now) per token, in nats, of the model as its blocks are now from where the states are on."""
        total = tokens = 0.0
        for part, states, dense in zip(self._parts, self._states, self._dense):
            with self._from(states):
                now = call(self._model, part).logits
            for ours, theirs in zip(dense[0].split(32), now[0].split(32)):
                ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
                total += float((ours.exp() * (ours - theirs)).sum())
            tokens += part.numel()
        return max(total / tokens, 0.0)

    def advance(self, index: int) -> None:
        """Moves the kept hidden states to before the block `index`, through blocks that are dense."""
        if index == self._at:
            return
        moved: list[Tensor] = []
        for part, states in zip(self._parts, self._states):
            with self._from(states), self._noting(index, moved):
                call(self._model, part)
        self._at, self._states = index, moved

    @contextmanager
    def _noting(self, index: int, kept: list[Tensor]) -> Iterator[None]:
        """Appends the hidden states that the block `index` gets."""
        handle = self._blocks[index].register_forward_pre_hook(
            lambda _, args, kwargs: kept.append(_states(args, kwargs).clone()), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _from(self, states: Tensor) -> Iterator[None]:
        """Blocks before those at hand hand on what they get, and the first of these gets `states`."""

        def begin(_, args, kwargs):
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        with ExitStack() as stack:
            for block in self._blocks[: self._at]:
                stack.enter_context(computing(block, lambda *args, **kwargs: _states(args, kwargs)))
            stack.callback(self._blocks[self._at].register_forward_pre_hook(begin, with_kwargs=True).remove)
            yield


def _states(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states that a block is called with."""
    return args[0] if args else kwargs["hidden_states"]
