"""Runs one decoder block at a time, with the arguments that the model gives it."""

from contextlib import contextmanager
from typing import Iterator

import torch
from torch import Tensor, nn

from ..errors import MamaError
from .targets import Target


class Stop(Exception):
    """Ends a forward pass once what was looked for is known."""


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def experts_one_by_one(targets: list[Target]) -> Iterator[None]:
    """Fused experts compute expert by expert, so that each matrix product shows its expert's tokens."""
    found = [getattr(t.module, "config", None) for t in targets if t.expert is not None]
    configs = {id(config): config for config in found if hasattr(config, "_experts_implementation")}
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]


class BlockRunner:
    """Runs single decoder blocks with the arguments that the model itself gives them beside the hidden states.

    These (masks, positions, rotary tables, a sliding window in some layers) do not depend on the tokens, so they are
    noted once per batch size, by one run of the model that ends before its last block.
    """

    def __init__(self, model: nn.Module, blocks: list[tuple[str, nn.Module]], may_stop: bool = True):
        self._model = model
        self._may_stop = may_stop  # False: engines whose hooks must see every forward pass to its end
        self._blocks = [block for _, block in blocks]
        self._noted: dict[int, list[tuple[tuple, dict]]] = {}

    def put(self, index: int, block: nn.Module) -> None:
        """Runs `block` in the place of the model's own."""
        self._blocks[index] = block

    def first_inputs(self, batch: Tensor) -> Tensor:
        """Hidden states before the first block for token ids `batch` (n, sequence_length)."""
        size = batch.shape[0]
        fresh = size not in self._noted
        states, *noted = self._watch(batch, self._blocks if fresh else self._blocks[:1])
        if fresh:
            self._noted[size] = noted
        elif not _same(noted[0], self._noted[size][0]):
            raise MamaError(
                f"the blocks of {type(self._model).__name__} get arguments that change with the tokens, which "
                "block-by-block calibration cannot give them: use method magnitude."
            )
        return states

    def run(self, index: int, states: Tensor) -> Tensor:
        """One block on hidden states (n, sequence_length, hidden)."""
        args, kwargs = self._noted[states.shape[0]][index]
        out = self._blocks[index](states, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _watch(self, batch: Tensor, blocks: list[nn.Module]) -> list:
        """[the first block's inputs, each block's (args, kwargs)]; stops before the last of `blocks` runs."""
        seen: list = []

        def hook(block, args, kwargs):
            states = args[0] if args else kwargs["hidden_states"]
            if not seen:
                seen.append(states)
            seen.append((args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"}))
            if block is blocks[-1] and self._may_stop:
                raise Stop

        handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
        try:
            self._model(input_ids=batch, use_cache=False)
        except Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _same(one, other) -> bool:
    """Equal arguments, tensors by value, through tuples, lists and dicts."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return True
