"""What pruning each matrix alone costs, measured: the divergence from the dense model at some sparsities.

No formula is believed: each matrix is pruned as the method prunes, everything else stays dense, and the model is run
from that block on to its outputs on a few sequences. That is a solve and part of a forward pass for each matrix and
each sparsity, so it takes many times as long as predicting (`predicted` in selection/allocation.py); the matrices of a
block share one pass for their grams, and nothing before a block is run again.
"""

from contextlib import ExitStack, contextmanager
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..engines.offload import readable, running_device
from ..model.blocks import find_blocks
from ..model.language import call
from ..model.runner import experts_one_by_one, inference
from ..model.sequences import Sequences, batches, spread_evenly
from ..model.targets import Target
from ..selection.allocation import curve_histogram
from ..solvers.problem import Gram, Solution
from .grams import collect

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
    blocks, device = find_blocks(model), running_device(model)
    wanted = sorted({min(factor * (1 - sparsity), 0.999) for factor in FACTORS})
    losses: dict[str, list[float]] = {}
    with inference(model), experts_one_by_one(targets):
        few = batches(spread_evenly(sequences, -(-len(sequences) // 4)), batch_size, device)
        parts = [part[:, :LENGTH] for part in batches(spread_evenly(sequences, SEQUENCES), 1, device)]
        tail = _Tail(model, [block for _, block in blocks], parts)
        bar = tqdm(total=len(targets) * len(wanted), desc="budget", unit="solve", disable=not progress, leave=False)
        with bar:
            for index, (_, block) in enumerate(blocks):
                own = [t for t in targets if t.block == index]
                with readable(block):
                    grams = collect(model, own, lambda: [call(model, part) for part in few]) if own else {}
                    for target in own:
                        if grams[target.name].tokens:
                            losses[target.name] = [
                                _alone(target, solve(target, grams[target.name], 1 - density), index, tail)
                                for density in wanted
                            ]
                        bar.update(len(wanted))
                    tail.advance(index)
    found = [
        curve_histogram(wanted, losses[t.name], t.shape[0] * t.shape[1]) if t.name in losses else None for t in targets
    ]
    empty = torch.zeros_like(next(own for own in found if own is not None)) if losses else torch.zeros(1)
    return torch.stack([empty if own is None else own for own in found])


def _alone(target: Target, solution: Solution, index: int, tail: "_Tail") -> float:
    """The divergence with this matrix alone pruned; it is put back."""
    weight, bias = target.matrix.clone(), None if target.bias is None else target.bias.detach().clone()
    target.matrix.copy_(solution.weight)
    if solution.bias is not None:
        target.bias.data.copy_(solution.bias)
    try:
        return tail.divergence(index)
    finally:
        target.matrix.copy_(weight)
        if bias is not None:
            target.bias.data.copy_(bias)


class _Tail:
    """Runs the model from one block on, from hidden states of the dense model that are kept.

    Args:
        parts: token ids (1, tokens); those beyond `MOST_LOGITS` are left out.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module], parts: list[Tensor]):
        self._model, self._blocks = model, blocks
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

    def divergence(self, index: int) -> float:
        """Mean KL(dense ‖ now) per token, in nats, of the model as its blocks from `index` on are now."""
        total = tokens = 0.0
        for part, states, dense in zip(self._parts, self._states, self._dense):
            with self._from(index, states):
                now = call(self._model, part).logits
            for ours, theirs in zip(dense[0].split(32), now[0].split(32)):
                ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
                total += float((ours.exp() * (ours - theirs)).sum())
            tokens += part.numel()
        return max(total / tokens, 0.0)

    def advance(self, index: int) -> None:
        """Moves the kept hidden states from before block `index` to behind it."""
        if index + 1 < len(self._blocks):
            moved: list[Tensor] = []
            for part, states in zip(self._parts, self._states):
                with self._from(index, states), self._noting(index + 1, moved):
                    call(self._model, part)
            self._states = moved

    @contextmanager
    def _noting(self, index: int, kept: list[Tensor]) -> Iterator[None]:
        """Appends the hidden states that the block `index` gets."""

        def note(_, args, kwargs):
            kept.append((args[0] if args else kwargs["hidden_states"]).clone())

        handle = self._blocks[index].register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _from(self, index: int, states: Tensor) -> Iterator[None]:
        """Blocks before `index` hand on what they get, and this one gets `states`."""

        def begin(_, args, kwargs):
            return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

        with ExitStack() as stack:
            for block in self._blocks[:index]:
                stack.enter_context(_handing_on(block))
            stack.callback(self._blocks[index].register_forward_pre_hook(begin, with_kwargs=True).remove)
            yield


@contextmanager
def _handing_on(block: nn.Module) -> Iterator[None]:
    """A block that puts out the hidden states that it gets."""
    own = {key: value for key, value in vars(block).items() if key == "forward"}

    def same(*args, **kwargs):
        return args[0] if args else kwargs["hidden_states"]

    block.forward = same
    try:
        yield
    finally:
        del block.forward
        block.__dict__.update(own)
