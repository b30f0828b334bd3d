"""Grams of every layer's inputs, one decoder block in memory at a time."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Callable, Iterator, Optional

import torch
from torch import Tensor, nn

from .targets import Target, find_blocks


@dataclass
class Gram:
    """Statistics of one layer's inputs X (tokens, in), fp32: `gram` Xᵀ X (in, in) and `total` Σ x (in,)."""

    gram: Tensor
    total: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, inputs: int, device) -> "Gram":
        return cls(torch.zeros(inputs, inputs, device=device), torch.zeros(inputs, device=device))

    def add(self, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self.gram.addmm_(rows.t(), rows)
        self.total += rows.sum(0)
        self.tokens += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.tokens, 1)

    @property
    def centred(self) -> Tensor:
        """Gram of the deviations from the mean input, (in, in)."""
        return self.gram - self.total.outer(self.mean)

    @property
    def norm(self) -> Tensor:
        """‖x_j‖ of each input over the calibration tokens, (in,)."""
        return self.gram.diagonal().clamp_min(0).sqrt()


class _Stop(Exception):
    """Ends a forward pass once the first block's inputs are known."""


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def collect(module: nn.Module, targets: list[Target], forward: Callable[[], None]) -> dict[str, Gram]:
    """Grams by target name while `forward` runs `module`."""
    grams = {t.name: Gram.zeros(t.shape[1], t.parameter.device) for t in targets}
    handles = [
        t.module.register_forward_pre_hook(lambda _, args, name=t.name: grams[name].add(args[0])) for t in targets
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return grams


def blockwise(
    model: nn.Module,
    rows: Tensor,
    targets: list[Target],
    visit: Callable[[list[Target], dict[str, Gram]], None],
    batch_size: int = 8,
    on_block: Optional[Callable[[int, int], None]] = None,
) -> None:
    """Calls `visit(targets, grams)` for each decoder block, calibrated on the blocks that `visit` has changed.

    The hidden states of one block at a time are kept, in the model's dtype. Targets outside every block
    (an output head named in `target_modules`) come last, from one run of the whole changed model.

    Args:
        rows: token ids, int64 (n, sequence_length).
        on_block: progress; called with (done, total) after each block.
    """
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    batches = rows.to(device).split(batch_size)
    with _inference(model):
        hidden = [_first_inputs(model, blocks[0][1], batch) for batch in batches]
        # Sliding-window and full-attention layers get different masks: each block's own keyword arguments
        # are noted once per distinct batch size, since they do not depend on the tokens.
        keywords = _keywords(model, blocks, batches)
        for index, (name, block) in enumerate(blocks):
            own = [t for t in targets if t.module_name.startswith(name + ".")]

            if own:
                visit(own, collect(block, own, lambda: _run(block, index, hidden, keywords)))
            _run(block, index, hidden, keywords, keep=True)
            if on_block:
                on_block(index + 1, len(blocks))
        hidden.clear()
        outside = [t for t in targets if t.block is None]
        if outside:
            grams = collect(model, outside, lambda: [model(input_ids=b, use_cache=False) for b in batches])
            visit(outside, grams)


def _run(block: nn.Module, index: int, hidden: list[Tensor], keywords: dict, keep: bool = False) -> None:
    """One block over all batches; `keep` replaces its inputs by its outputs."""
    for i, states in enumerate(hidden):
        args, kwargs = keywords[states.shape[0]][index]
        out = block(states, *args, **kwargs)
        if keep:
            hidden[i] = out[0] if isinstance(out, tuple) else out


def _first_inputs(model: nn.Module, block: nn.Module, batch: Tensor) -> Tensor:
    caught = []

    def hook(_, args, kwargs):
        caught.append(args[0] if args else kwargs["hidden_states"])
        raise _Stop

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        model(input_ids=batch, use_cache=False)
    except _Stop:
        pass
    finally:
        handle.remove()
    return caught[0]


def _keywords(model, blocks, batches) -> dict[int, list[tuple[tuple, dict]]]:
    """By batch size: each block's arguments beside the hidden states (masks, positions, rotary tables)."""
    found: dict[int, list] = {}
    for batch in batches:
        if batch.shape[0] in found:
            continue
        seen = found[batch.shape[0]] = []

        def hook(_, args, kwargs):
            kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            seen.append((args[1:], kwargs))

        handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for _, block in blocks]
        try:
            model(input_ids=batch, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
    return found
