"""Grams of every layer's inputs, one decoder block in memory at a time."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Callable, Iterator, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .errors import MamaError
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
    """Ends a forward pass once what was looked for is known."""


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def _experts_one_by_one(targets: list[Target]) -> Iterator[None]:
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


class _ExpertInputs(TorchFunctionMode):
    """Sees every matrix product while it is active; where one factor is a fused expert, the other is its input.

    Works whatever the module is called and however it routes: a product with `parameter[expert]` (any of `linear`,
    `matmul`, `@`, `mm`) or a batched product with the whole 3-D parameter.
    """

    _PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
    _BATCHED = {torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}

    def __init__(self, targets: list[Target], grams: dict[str, Gram]):
        super().__init__()
        self._grams = grams
        # Where each expert's matrix starts in memory: a view of it starts there too.
        self._single = {t.parameter.data[t.expert].data_ptr(): t for t in targets}
        self._whole: dict[int, dict[int, Target]] = {}
        for t in targets:
            self._whole.setdefault(t.parameter.data.data_ptr(), {})[t.expert] = t

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._PRODUCTS or function in self._BATCHED:
            inputs, weight = [*args, *(kwargs or {}).values()][:2]
            self._note(function, inputs, weight)
        return function(*args, **(kwargs or {}))

    def _note(self, function, inputs: Tensor, weight: Tensor) -> None:
        address = weight.data_ptr()
        if weight.dim() == 2 and address in self._single:
            target = self._single[address]
            if inputs.shape[-1] == target.shape[1]:
                self._grams[target.name].add(inputs)
        elif weight.dim() == 3 and inputs.dim() == 3 and address in self._whole and function in self._BATCHED:
            for expert, target in self._whole[address].items():
                rows = inputs[expert]
                if rows.shape[-1] == target.shape[1]:
                    self._grams[target.name].add(rows[(rows != 0).any(-1)])  # tokens of other experts are zeroed


def collect(module: nn.Module, targets: list[Target], forward: Callable[[], None]) -> dict[str, Gram]:
    """Grams by target name while `forward` runs `module`; layers that read the very same tensor share one `Gram`.

    A fused expert's gram is over the tokens that were routed to it.
    """
    linear = [t for t in targets if t.expert is None]
    fused = [t for t in targets if t.expert is not None]
    grams = {t.name: Gram.zeros(t.shape[1], t.parameter.device) for t in fused}
    leader: dict[str, str] = {}  # by target name: whose gram it shares
    last: list = [None, None]  # the newest input and who took it

    def note(target: Target, inputs: Tensor) -> None:
        if target.name not in leader:
            # Query, key and value (gate and up) are called one after the other on one and the same tensor.
            leader[target.name] = last[1] if last[0] is inputs else target.name
            if leader[target.name] == target.name:
                grams[target.name] = Gram.zeros(target.shape[1], target.parameter.device)
            else:
                grams[target.name] = grams[leader[target.name]]
        first = leader[target.name]
        if first == target.name:
            grams[first].add(inputs)
        elif last[0] is not inputs:
            raise MamaError(
                f"{target.name} does not read the tensor that {first} reads in every batch: this model's layers "
                "cannot be calibrated."
            )
        last[:] = inputs, first

    handles = [
        t.module.register_forward_pre_hook(lambda _, args, t=t: note(t, args[0]))
        for t in linear
    ]
    try:
        with _ExpertInputs(fused, grams) if fused else nullcontext():
            forward()
    finally:
        last.clear()
        for handle in handles:
            handle.remove()
    for name, gram in grams.items():
        if not torch.isfinite(gram.total).all():
            raise MamaError(
                f"the inputs of {name} hold NaN or infinity during calibration: load the model in another dtype "
                "(`dtype` float32 or bfloat16), or check its weights."
            )
    for target in linear:  # an expert in a list of modules to which no token came
        if target.name not in grams:
            grams[target.name] = Gram.zeros(target.shape[1], target.parameter.device)
    return grams


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
    with _inference(model), _experts_one_by_one(targets):
        calls = _Calls(model, blocks)
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


class _Calls:
    """How the model calls its blocks: each block's arguments beside the hidden states.

    They (masks, positions, rotary tables, a sliding window in some layers) do not depend on the tokens, so they are
    noted once per batch size, by one run of the model that ends before its last block.
    """

    def __init__(self, model: nn.Module, blocks: list[tuple[str, nn.Module]]):
        self._model = model
        self._blocks = [block for _, block in blocks]
        self._noted: dict[int, list[tuple[tuple, dict]]] = {}

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
            if block is blocks[-1]:
                raise _Stop

        handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in blocks]
        try:
            self._model(input_ids=batch, use_cache=False)
        except _Stop:
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
