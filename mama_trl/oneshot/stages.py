"""Calibration in the order in which a block computes, towards what the dense model puts out.

SparseGPT and its kin measure a whole block while it is still dense, and ask each layer to repeat its own dense outputs.
Here a block is pruned stage by stage: layers that read the same tensor (query, key, value; then the attention's output;
then gate, up; then down) are one stage, and each stage is measured on inputs that the pruned layers before it
computed. A second stream of hidden states runs through the dense blocks beside the pruned one. A layer that writes to
the residual stream gets as its goal

    y* = (dense residual stream after the layer) − (pruned residual stream before the layer),

so that it also repairs what earlier layers did wrong; a layer that reads a norm of the residual stream is asked for
the outputs that it has in the dense model, not for those that its dense weight makes of disturbed inputs. Nothing is
assumed about names: which layer writes where is found by silencing each layer once on a short probe and looking at
what changes; which norm feeds a layer, by the identity of tensors.
"""

from dataclasses import dataclass, field
from typing import Callable, Optional

import torch
from torch import Tensor, nn

from ..calibration import Gram, _Calls, _experts_one_by_one, _inference, _Stop, collect
from ..placement import Local
from ..targets import Target, find_blocks

PROBE_TOKENS = 32
INPUT, OUTPUT = "(input)", "(output)"


@dataclass
class Goal:
    """What a layer should put out, over the tokens of its `Gram`: Σ y* xᵀ (out, in) and Σ y* (out,), fp32."""

    cross: Tensor
    total: Tensor

    @classmethod
    def of_inputs(cls, weight: Tensor, bias: Optional[Tensor], pairs: Tensor, dense_total: Tensor, gram: Gram):
        """The outputs W x' + b of the dense model's inputs x', from `pairs` Σ x' xᵀ (in, in) and Σ x' (in,)."""
        cross, total = weight @ pairs, weight @ dense_total
        if bias is not None:
            cross, total = cross + bias.outer(gram.total), total + gram.tokens * bias
        return cls(cross, total)

    def add(self, outputs: Tensor, inputs: Tensor) -> None:
        """`outputs` y* (tokens, out) and `inputs` x (tokens, in) of one batch, fp32."""
        self.cross.addmm_(outputs.t(), inputs)
        self.total += outputs.sum(0)


@dataclass(eq=False)
class Stage:
    """Targets that are measured together.

    `writer` adds its output to the residual stream, which is then seen at `place`. `norm` is the submodule that makes
    the stage's inputs from the residual stream at `source`. Places are names of submodules, meaning their inputs, or
    INPUT and OUTPUT of the block. `last` is the module whose inputs end the measuring pass.
    """

    targets: list[Target] = field(default_factory=list)
    writer: Optional[Target] = None
    place: str = ""
    norm: Optional[nn.Module] = None
    source: str = ""
    last: Optional[nn.Module] = None
    whole: Optional[nn.Module] = None


def staged(
    model: nn.Module,
    rows: Tensor,
    targets: list[Target],
    visit: Callable[[list[Target], dict[str, Gram], dict[str, Goal]], None],
    batch_size: int = 8,
    on_block: Optional[Callable[[int, int], None]] = None,
    skip: Optional[Callable[[list[Target]], bool]] = None,
    finish: Optional[Callable[[list[Target]], None]] = None,
    placement: Optional[Local] = None,
) -> None:
    """Calls `visit(targets, grams, goals)` for each stage of each block, on inputs that pruned layers computed.

    Two hidden states per token are kept, dense and pruned, and for the block at hand the dense residual stream after
    its first writer and that writer's inputs, all in the model's dtype. Targets outside every block come last.

    Args:
        rows: token ids, int64 (n, sequence_length).
        visit: prunes the targets it is given; `goals` holds only the layers that write to the residual stream.
        on_block: progress; called with (done, total) after each block.
        skip: called with a block's targets before anything is measured; True = they are pruned already.
        finish: called with a block's targets when all of them are pruned.
        placement: gives each block in a form that this process can run alone; default as it stands in the model.
    """
    placement = placement if placement is not None else Local()
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    rows = rows.to(device)
    batches = rows.split(batch_size)
    with _inference(model), _experts_one_by_one(targets):
        calls = _Calls(model, blocks, placement.may_stop)
        dense = [calls.first_inputs(batch) for batch in batches]
        # Its own: what a block is given depends on batch size and length.
        short = _Calls(model, blocks, placement.may_stop)
        probe = short.first_inputs(placement.same(rows[:1, :PROBE_TOKENS]))
        pruned = list(dense)
        for index, (name, block) in enumerate(blocks):
            own = [t for t in targets if t.module_name.startswith(name + ".")]
            block, own = placement.runnable(index, name, block, own)
            calls.put(index, block)
            short.put(index, block)
            plan = _plan(block, name, own, lambda: short.run(index, probe)) if own else []
            run = [lambda i=i: calls.run(index, pruned[i]) for i in range(len(pruned))]
            # The first stage's inputs need no pruned layer of this block, so it is measured before the dense stream
            # moves on: then the stream before the block need not be kept.
            early = [_measure(block, plan[0], run, {INPUT: dense})] if plan and plan[0].writer is None else []
            streams = _run_dense(block, plan, lambda states: calls.run(index, states), dense)
            probe = short.run(index, probe)
            with _Replay() as replay:
                if own and not (skip and skip(own)):
                    for stage in plan:
                        kept = replay.inputs_of(stage)
                        found = early.pop() if early else _measure(block, stage, replay.around(run), streams, kept)
                        visit(stage.targets, *found)
                        replay.start(stage)
                        for place in (stage.place, stage.source):
                            if not any(place in (later.place, later.source) for later in plan[plan.index(stage) + 1 :]):
                                streams.pop(place, None)
                    if finish:
                        finish(own)
                streams.clear()
                for i, again in enumerate(replay.around(run)):
                    pruned[i] = again()
            placement.release(index)
            if on_block:
                on_block(index + 1, len(blocks))
        dense.clear()
        pruned.clear()
        outside = [t for t in targets if t.block is None]
        if outside and not (skip and skip(outside)):
            visit(outside, collect(model, outside, lambda: [model(input_ids=b, use_cache=False) for b in batches]), {})
            if finish:
                finish(outside)


def _run_dense(block: nn.Module, plan: list[Stage], run, dense: list[Tensor]) -> dict[str, list[Tensor]]:
    """Moves `dense` through a block; the dense residual stream at every place that later stages need, by batch."""
    places = {place for stage in plan for place in (stage.place, stage.source) if place} - {INPUT, OUTPUT}
    streams: dict[str, list[Tensor]] = {place: [] for place in places}
    handles = [
        block.get_submodule(place).register_forward_pre_hook(lambda _, args, kept=streams[place]: kept.append(args[0]))
        for place in places
    ]
    if any(stage.source == INPUT for stage in plan[1:]):  # a parallel block: its MLP reads the block's input too
        streams[INPUT] = list(dense)
    try:
        for i, states in enumerate(dense):
            dense[i] = run(states)
        streams[OUTPUT] = dense
    finally:
        for handle in handles:
            handle.remove()
    return streams


class _Replay:
    """Spares a block's attention on passes after its last layer is pruned: see `Stage.whole`."""

    def __init__(self):
        self._inputs: dict[Stage, list[Tensor]] = {}
        self._forwards: list[tuple[nn.Module, dict]] = []
        self._batch = 0

    def __enter__(self) -> "_Replay":
        return self

    def __exit__(self, *_) -> None:
        for module, own in self._forwards:
            del module.forward  # the class's own is seen again, or what another library had put there
            module.__dict__.update(own)
        self._inputs.clear()

    def inputs_of(self, stage: Stage) -> Optional[list[Tensor]]:
        """Where the writer's inputs are to be kept, by batch; None if nothing could be spared by that."""
        if stage.whole is None or stage.place == OUTPUT:
            return None
        return self._inputs.setdefault(stage, [])

    def start(self, stage: Stage) -> None:
        if stage not in self._inputs:
            return
        inputs, writer = self._inputs[stage], stage.writer.module
        self._forwards.append((stage.whole, {k: v for k, v in vars(stage.whole).items() if k == "forward"}))
        stage.whole.forward = lambda *args, **kwargs: (writer(inputs[self._batch]), None)

    def around(self, runs: list) -> list:
        """`runs`, each saying first which batch it is."""
        def one(i, run):
            self._batch = i
            return run()
        return [lambda i=i, run=run: one(i, run) for i, run in enumerate(runs)]


def _measure(
    block: nn.Module, stage: Stage, runs: list, streams: dict[str, list[Tensor]], kept: Optional[list[Tensor]] = None
):
    """(grams, goals) of one stage; each pass over a batch ends as soon as the stage has been seen.

    The writer's inputs are appended to `kept`.
    """
    writer, first = stage.writer, stage.targets[0]
    seen: dict[str, Tensor] = {}
    goal = pairs = None
    if writer:
        cross = torch.zeros(writer.shape, device=writer.parameter.device)
        goal = Goal(cross, cross.new_zeros(writer.shape[0]))
    elif stage.norm is not None:
        pairs = torch.zeros(first.shape[1], first.shape[1], device=first.parameter.device)
        pairs = Goal(pairs, pairs.new_zeros(first.shape[1]))

    def silence(_, args, out):
        seen["inputs"] = args[0]
        return torch.zeros_like(out)

    def arrive(_, args):
        seen["before"] = args[0]
        raise _Stop

    def stop(_, args):
        seen["inputs"] = args[0]
        raise _Stop

    def forward() -> None:
        # Registered here, after the hooks that feed the grams, so that those run first.
        handles = []
        if writer:
            handles.append(writer.module.register_forward_hook(silence))
            if stage.place != OUTPUT:
                handles.append(block.get_submodule(stage.place).register_forward_pre_hook(arrive))
        elif stage.last is not None:
            handles.append(stage.last.register_forward_pre_hook(stop))
        try:
            for i, run in enumerate(runs):
                try:
                    seen["before"] = run()
                except _Stop:
                    pass
                if kept is not None:
                    kept.append(seen["inputs"])
                if writer:
                    wanted = _tokens(streams[stage.place][i]) - _tokens(seen["before"])
                    goal.add(wanted, _tokens(seen["inputs"]))
                elif pairs is not None:
                    wanted = stage.norm(streams[stage.source][i])
                    pairs.add(_tokens(wanted), _tokens(seen["inputs"]))
        finally:
            for handle in handles:
                handle.remove()

    grams = collect(block, stage.targets, forward)
    if writer:
        return grams, {writer.name: goal}
    if pairs is None:
        return grams, {}
    return grams, {
        t.name: Goal.of_inputs(
            t.matrix.float(), None if t.bias is None else t.bias.detach().float(), pairs.cross, pairs.total,
            grams[t.name],
        )
        for t in stage.targets
    }


# ---------------------------------------------------------------------- which layer reads and writes what


def _plan(block: nn.Module, name: str, own: list[Target], run: Callable[[], Tensor]) -> list[Stage]:
    """The block's stages in the order of computation, found by running it on a short probe."""
    order, inputs = _order(own, run)
    stages: list[Stage] = []
    shared: Optional[Tensor] = None
    for target in order:
        fused = target.expert is not None
        same_experts = fused and stages and stages[-1].targets[-1].parameter_name == target.parameter_name
        same_input = not fused and stages and inputs[target.name] is shared
        if not (same_experts or same_input):
            stages.append(Stage())
        shared = None if fused else inputs[target.name]
        stages[-1].targets.append(target)
        stages[-1].last = None if fused else target.module
    plain = _observe(block, run)
    places = _places(block, [t for t in order if t.expert is None], plain, run)
    for stage in stages:
        writers = [t for t in stage.targets if t.name in places]
        if len(writers) == 1 and len(stage.targets) == 1:
            stage.writer, stage.place = writers[0], places[writers[0].name]
            stage.whole = plain.wholes.get(writers[0].module)
    for stage in stages:
        if stage.writer is None and stage.last is not None:
            stage.norm, stage.source = _source(block, stage, plain, set(places.values()) - {OUTPUT} | {INPUT})
    uncalled = [t for t in own if t not in order]
    if uncalled:  # experts in a list to which no token of the probe came: measured over a whole pass, at the end
        stages.append(Stage(uncalled))
    return stages


def _order(own: list[Target], run: Callable[[], Tensor]) -> tuple[list[Target], dict[str, Tensor]]:
    """Targets in the order of their first call, and the tensor that each linear layer read."""
    called: list[nn.Module] = []
    inputs: dict[nn.Module, Tensor] = {}

    def hook(module, args):
        if module not in inputs:
            called.append(module)
            inputs[module] = args[0] if args else None

    handles = [module.register_forward_pre_hook(hook) for module in dict.fromkeys(t.module for t in own)]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    order = [t for module in called for t in own if t.module is module]
    return order, {t.name: inputs[t.module] for t in order}


@dataclass
class _Seen:
    """One run of a block: inputs of its submodules by name in the order of their calls (between INPUT and OUTPUT),
    the submodules' outputs, and by submodule which other one returns its output as (output, None)."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    wholes: dict[nn.Module, nn.Module]


def _observe(block: nn.Module, run: Callable[[], Tensor], silenced: Optional[nn.Module] = None) -> _Seen:
    """Runs the block; submodules that are called more than once are left out. `silenced` puts out zeros."""
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
                return torch.zeros_like(out) if module is silenced else None
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


def _places(block: nn.Module, candidates: list[Target], plain: _Seen, run: Callable[[], Tensor]) -> dict[str, str]:
    """By target name: the earliest place where its output is found *added* to a residual stream.

    A layer writes to a place if the value there differs from the one with the layer silenced by exactly the layer's
    output, and something was there before.
    """
    names = {module: name for name, module in block.named_modules()}
    found = {}
    for target in candidates:
        output = plain.outputs.get(names[target.module])
        if output is None or _tokens(output).shape != _tokens(plain.inputs[INPUT]).shape:
            continue
        silent = _observe(block, run, target.module).inputs
        change = _tokens(output)
        for place, value in plain.inputs.items():
            if place not in silent or not value.is_floating_point() or _tokens(value).shape != change.shape:
                continue
            value, before = _tokens(value), _tokens(silent[place])
            difference = value - before
            rounding = torch.finfo(output.dtype).eps * (value.norm() + before.norm())
            added = (difference - change).norm() <= 1e-4 * change.norm() + rounding
            # Where nothing changed at all, rounding in bf16 could hide that: the change must be seen.
            if added and before.norm() > 0 and (difference * change).sum() >= 0.5 * change.square().sum() > 0:
                found[target.name] = place
                break
    return found


def _tokens(states: Tensor) -> Tensor:
    """(tokens, width) fp32: some blocks fold batch and sequence into one dimension on their way."""
    return states.reshape(-1, states.shape[-1]).float()


def _source(block: nn.Module, stage: Stage, plain: _Seen, places: set[str]) -> tuple[Optional[nn.Module], str]:
    """The submodule that turns the residual stream at one of `places` into the stage's inputs, and that place."""
    names = {module: name for name, module in block.named_modules()}
    wanted = plain.inputs.get(names[stage.targets[0].module])
    for name, out in plain.outputs.items():
        if out is wanted:
            for place in places:
                if plain.inputs.get(place) is plain.inputs.get(name, block):
                    return block.get_submodule(name), place
    return None, ""
