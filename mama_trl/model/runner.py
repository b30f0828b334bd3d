"""Runs one decoder block at a time, with the arguments that the model gives it."""

from contextlib import contextmanager
from typing import Callable, Iterator

import torch
from torch import Tensor, nn

from ..errors import MamaError
from .language import call, is_encoder_decoder
from .targets import Target

_PLAIN = "use method magnitude, or in training `indicators` magnitude and `redistribution` none"


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
def computing(module: nn.Module, forward: Callable) -> Iterator[None]:
    """`module` computes `forward` for a while; its hooks see it all the same."""
    own = {key: value for key, value in vars(module).items() if key == "forward"}  # what another library put there
    module.forward = forward
    try:
        yield
    finally:
        del module.forward  # the class's own is seen again
        module.__dict__.update(own)


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
    noted once per shape of a batch, by one run of the model that ends before its last block.

    Raises:
        MamaError: an encoder-decoder, whose decoder reads what the encoder made of other tokens.
    """

    def __init__(self, model: nn.Module, blocks: list[tuple[str, nn.Module]], may_stop: bool = True):
        check_walkable(model)
        self._model = model
        self._may_stop = may_stop  # False: engines whose hooks must see every forward pass to its end
        self._blocks = [block for _, block in blocks]
        self._noted: dict[torch.Size, list[tuple[tuple, dict]]] = {}
        self._dtype = torch.float32  # of the hidden states

    def put(self, index: int, block: nn.Module) -> None:
        """Runs `block` in the place of the model's own."""
        self._blocks[index] = block

    def first_inputs(self, batch: Tensor) -> Tensor:
        """Hidden states before the first block for token ids `batch` (n, sequence_length)."""
        fresh = batch.shape not in self._noted
        states, calls = self._watch(batch, self._blocks if fresh else self._blocks[:1])
        self._dtype = states.dtype
        if fresh:
            if len(calls) != len(self._blocks):
                raise MamaError(
                    f"{type(self._model).__name__} makes {len(calls)} calls of {len(self._blocks)} blocks, where "
                    f"calibration needs one of each, in order: {_PLAIN}."
                )
            self._noted[batch.shape] = calls
        elif not _same(calls[0], self._noted[batch.shape][0]):
            raise MamaError(
                f"the blocks of {type(self._model).__name__} get arguments that change with the tokens, which "
                f"block-by-block calibration cannot give them: {_PLAIN}."
            )
        return states

    def run(self, index: int, states: Tensor) -> Tensor:
        """One block on hidden states (n, sequence_length, hidden)."""
        args, kwargs = self._noted[states.shape[:2]][index]
        if states.dtype == torch.float32 != self._dtype:  # a block that has been made finer for a while
            args, kwargs = _in_fp32(args), _in_fp32(kwargs)
        out = self._blocks[index](states, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def _watch(self, batch: Tensor, blocks: list[nn.Module]) -> tuple[Tensor, list[tuple[tuple, dict]]]:
        """The first block's inputs and each block's (args, kwargs); stops before the last of `blocks` runs."""
        states: list[Tensor] = []
        calls: list[tuple[tuple, dict]] = []

        def hook(block, args, kwargs):
            name = None if args else _states_in(kwargs, batch)
            states.append(args[0] if args else kwargs[name])
            calls.append((args[1:], {key: value for key, value in kwargs.items() if key != name}))
            if block is blocks[-1] and self._may_stop:
                raise Stop

        handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
        try:
            call(self._model, batch)
        except Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return states[0], calls


def check_walkable(model: nn.Module) -> None:
    """Raises `MamaError` for a model whose blocks cannot be run one after the other on the tokens alone."""
    if is_encoder_decoder(model):
        raise MamaError(
            f"{type(model).__name__} is an encoder-decoder, whose decoder cannot be calibrated block by block: "
            f"{_PLAIN}."
        )


def _states_in(kwargs: dict, batch: Tensor) -> str:
    """Under which name a block gets its hidden states. Raises `MamaError` if that cannot be told."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.shape[:2] == batch.shape:
            return name
    raise MamaError(f"a block gets no hidden states (n, sequence_length, hidden) that could be calibrated: {_PLAIN}.")


def _in_fp32(value):
    """Floating point tensors in fp32, through tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(map(_in_fp32, value))
    return {key: _in_fp32(own) for key, own in value.items()} if isinstance(value, dict) else value


def _same(one, other) -> bool:
    """Equal arguments, tensors by value, through tuples, lists and dicts."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return True
