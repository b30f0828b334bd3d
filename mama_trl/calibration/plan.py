"""Finds the layer groups of a decoder block: which layers read one tensor, and which write to the residual stream.

    INPUT ─┬─────────────────────────────────────(+)─┬────────────────────────────(+)─▶ OUTPUT
           └▶ norm₁ ─▶ q, k, v ─▶ attention ─▶ o ─┘  └▶ norm₂ ─▶ gate, up ─▶ down ─┘
                       group 1              group 2              group 3     group 4
               norm = norm₁,             writer,         norm = norm₂,       writer,
               source = INPUT            place = norm₂   source = norm₂      place = OUTPUT

Names say nothing about that, so the block is run on a short probe: which layer writes to the residual stream, and where
that is seen, shows when each layer is silenced once; which norm feeds a layer, by the identity of tensors. A place is
named after the submodule whose input it is.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Callable, Iterator, Optional

import torch
from torch import Tensor, nn

from ..model.runner import computing
from ..model.targets import Target
from .grams import first_of

INPUT, OUTPUT = "(input)", "(output)"


@dataclass(eq=False)
class LayerGroup:
    """Layers of a block that read the same tensor, and so are measured together.

    Args:
        targets: these layers, in the order of computation.
        writer: the one of them whose output is added to the residual stream; None where none is.
        place: where the residual stream with that output is seen first.
        post: the norm that a writer's output goes through before it is added (Gemma 2 and 3, OLMo 2, GLM-4).
        norm: the submodule that makes what the layers read from the residual stream at `source`.
        last: the module at whose inputs a pass that measures the group may end.
        whole: the attention module, where the block can be started behind this group; see `silenced`.
        apart: the probe did not show which targets read one tensor, so each gets a gram of its own.

    Places are names of submodules, meaning their inputs, or INPUT and OUTPUT of the block.
    """

    targets: list[Target] = field(default_factory=list)
    writer: Optional[Target] = None
    place: str = ""
    post: Optional["PostNorm"] = None
    norm: Optional[nn.Module] = None
    source: str = ""
    last: Optional[nn.Module] = None
    whole: Optional[nn.Module] = None
    apart: bool = False


@dataclass(eq=False)
class PostNorm:
    """A root mean square norm that a writer's output goes through: N(y) = gain · y / rms(y), per token.

    `gain` (width,) fp32, so that N's own way to store it (Gemma adds one) does not matter.
    """

    module: nn.Module
    gain: Tensor

    @classmethod
    def of(cls, module: nn.Module, outputs: Tensor) -> Optional["PostNorm"]:
        """The norm if `module` makes gain · y / rms(y) of `outputs` y (tokens, width); None if anything else."""
        dtype = next((p.dtype for p in module.parameters()), outputs.dtype)
        gain = module(torch.ones_like(outputs[:1], dtype=dtype)).float()[0]
        expected = gain * outputs / rms(outputs)
        found = module(outputs.to(dtype)).float()
        tolerance = 1e-3 if dtype == torch.float32 else 3e-2
        return cls(module, gain) if (found - expected).norm() <= tolerance * expected.norm() else None


def rms(states: Tensor) -> Tensor:
    """Root mean square of each row, (rows, 1)."""
    return states.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def startable_segments(groups: list[LayerGroup]) -> list[list[LayerGroup]]:
    """The groups cut behind each one that the block can be started behind; one empty list if there are none."""
    result: list[list[LayerGroup]] = [[]]
    for group in groups:
        result[-1].append(group)
        if group.whole is not None:
            result.append([])
    return result


@contextmanager
def silenced(whole: nn.Module) -> Iterator[None]:
    """Starts a block behind its attention `whole`, which now returns zeros at no cost.

    Given the residual stream as it is behind the attention, the block adds nothing to it there and computes the rest.
    """
    def nothing(*args, **kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        return states.new_zeros(()).expand_as(states), None

    with computing(whole, nothing):
        yield


@contextmanager
def uncomputed(layer: nn.Module, width: int) -> Iterator[None]:
    """A linear layer puts out zeros (..., width), at no cost: its hooks see what it reads all the same."""

    def nothing(inputs: Tensor) -> Tensor:
        return inputs.new_zeros(()).expand(*inputs.shape[:-1], width)

    with computing(layer, nothing):
        yield


def plan_groups(
    block: nn.Module, own: list[Target], run: Callable[[Tensor], Tensor], probe: Tensor
) -> list[LayerGroup]:
    """The groups of a block's targets `own` in the order of computation.

    Args:
        run: the block on hidden states (n, sequence_length, hidden).
        probe: a few hidden states before the block.
    """
    order, inputs = _order(own, lambda: run(probe))
    groups: list[LayerGroup] = []
    shared: Optional[Tensor] = None
    for target in order:
        fused = target.expert is not None
        same_experts = fused and groups and groups[-1].targets[-1].parameter_name == target.parameter_name
        same_input = not fused and groups and inputs[target.name] is shared
        if not (same_experts or same_input):
            groups.append(LayerGroup())
        shared = None if fused else inputs[target.name]
        groups[-1].targets.append(target)
        groups[-1].last = None if fused else target.module
    plain = _observe(block, lambda: run(probe))
    places = _places(block, [t for t in order if t.expert is None], plain, lambda: run(probe))
    for group in groups:
        writers = [t for t in group.targets if t.name in places]
        if len(writers) == 1 and len(group.targets) == 1:
            group.writer, (group.place, group.post) = writers[0], places[writers[0].name]
            group.whole = _startable(group, plain, run)
    for group in groups:
        if group.writer is None and group.last is not None:
            streams = {place for place, _ in places.values()} - {OUTPUT} | {INPUT}
            group.norm, group.source = _source(block, group, plain, streams)
    uncalled = [t for t in own if t not in order]
    if uncalled:  # experts in a list to which no token of the probe came: measured over a whole pass, at the end
        groups.append(LayerGroup(uncalled, apart=True))
    return groups


def _startable(group: LayerGroup, plain: "_Seen", run: Callable[[Tensor], Tensor]) -> Optional[nn.Module]:
    """The group's `whole` if the block, started behind it, puts out the very same; None if there is no such thing."""
    whole = plain.wholes.get(group.writer.module)
    states = plain.inputs.get(group.place)
    if whole is None or group.place == OUTPUT or states.shape != plain.inputs[INPUT].shape:
        return None
    with silenced(whole):
        return whole if torch.equal(run(states), plain.inputs[OUTPUT]) else None


def _order(own: list[Target], run: Callable[[], Tensor]) -> tuple[list[Target], dict[str, Tensor]]:
    """Targets in the order of their first call, and the tensor that each linear layer read."""
    called: list[nn.Module] = []
    inputs: dict[nn.Module, Tensor] = {}

    def hook(module, args, kwargs):
        if module not in inputs:
            called.append(module)
            inputs[module] = first_of(args, kwargs)

    modules = dict.fromkeys(t.module for t in own)
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    order = [t for module in called for t in own if t.module is module]
    return order, {t.name: inputs[t.module] for t in order}


@dataclass
class _Seen:
    """What hooks saw of one run of a block.

    Args:
        inputs: of its submodules, by name in the order of their calls, between INPUT and OUTPUT.
        outputs: of its submodules, by name.
        wholes: by submodule, which other one returns its output as (output, None): the attention of its last layer.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    wholes: dict[nn.Module, nn.Module]


def _observe(block: nn.Module, run: Callable[[], Tensor], muted: Optional[nn.Module] = None) -> _Seen:
    """Runs the block; submodules that are called more than once are left out. `muted` puts out zeros."""
    seen = _Seen({}, {}, {})
    newest: list = [None, None]
    repeated: set[str] = set()

    def before(name: str):
        def hook(_, args):
            if args and isinstance(args[0], Tensor):
                repeated.add(name) if name in seen.inputs else seen.inputs.__setitem__(name, args[0])
        return hook

    def after(name: str):
        def hook(module, _, out):
            if isinstance(out, tuple) and len(out) == 2 and out[1] is None and out[0] is newest[0]:
                seen.wholes[newest[1]] = module
            if isinstance(out, Tensor):
                seen.outputs[name] = out
                newest[:] = out, module
                return torch.zeros_like(out) if module is muted else None
        return hook

    modules = [(name, module) for name, module in block.named_modules() if name]
    handles = [block.register_forward_pre_hook(before(INPUT))]
    handles += [module.register_forward_pre_hook(before(name)) for name, module in modules]
    handles += [module.register_forward_hook(after(name)) for name, module in modules]
    try:
        seen.inputs[OUTPUT] = run()
    finally:
        for handle in handles:
            handle.remove()
    for name in repeated:
        del seen.inputs[name]
        seen.outputs.pop(name, None)
    return seen


def _places(
    block: nn.Module, candidates: list[Target], plain: _Seen, run: Callable[[], Tensor]
) -> dict[str, tuple[str, Optional[PostNorm]]]:
    """By target name: the earliest place where its output, or a norm of it, is found *added* to a residual stream.

    A layer writes to a place if the value there differs from the one with the layer silenced by exactly the layer's
    output (what the norm behind it makes of it), and something was there before.
    """
    names = {module: name for name, module in block.named_modules()}
    found = {}
    for target in candidates:
        output = plain.outputs.get(names[target.module])
        if output is None or tokens_of(output).shape != tokens_of(plain.inputs[INPUT]).shape:
            continue
        silent = _observe(block, run, target.module).inputs
        behind = [name for name, value in plain.inputs.items() if value is output and name in plain.outputs]
        behind = behind if target.bias is None else []  # a weighted bias has no column of its own
        post = PostNorm.of(block.get_submodule(behind[0]), tokens_of(output)) if behind else None
        change = tokens_of(plain.outputs[behind[0]] if post else output)
        for place, value in plain.inputs.items():
            if place not in silent or not value.is_floating_point() or tokens_of(value).shape != change.shape:
                continue
            value, before = tokens_of(value), tokens_of(silent[place])
            difference = value - before
            rounding = torch.finfo(output.dtype).eps * (value.norm() + before.norm())
            added = (difference - change).norm() <= 1e-4 * change.norm() + rounding
            # Where nothing changed at all, rounding in bf16 could hide that: the change must be seen.
            if added and before.norm() > 0 and (difference * change).sum() >= 0.5 * change.square().sum() > 0:
                found[target.name] = place, post
                break
    return found


def tokens_of(states: Tensor) -> Tensor:
    """(tokens, width) fp32: some blocks fold batch and sequence into one dimension on their way."""
    return states.reshape(-1, states.shape[-1]).float()


def _source(block: nn.Module, group: LayerGroup, plain: _Seen, places: set[str]) -> tuple[Optional[nn.Module], str]:
    """The submodule that turns the residual stream at one of `places` into the group's inputs, and that place; the
    identity where the group reads the stream itself."""
    names = {module: name for name, module in block.named_modules()}
    wanted = plain.inputs.get(names[group.targets[0].module])
    for place in places:
        if wanted is not None and plain.inputs.get(place) is wanted:
            return nn.Identity(), place
    for name, out in plain.outputs.items():
        if out is wanted:
            for place in places:
                if plain.inputs.get(place) is plain.inputs.get(name, block):
                    return block.get_submodule(name), place
    return None, ""
