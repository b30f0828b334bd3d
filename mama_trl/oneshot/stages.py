"""Calibration in the order in which a block computes, towards what the dense model puts out.

SparseGPT and its kin measure a whole block while it is still dense, and ask each layer to repeat its own dense outputs.
Here a block is pruned stage by stage: layers that read the same tensor (query, key, value; then the attention's output;
then gate, up; then down) are one stage, and each stage is measured on inputs that the pruned layers before it
computed. A second stream of hidden states runs through the dense blocks beside the pruned one. A layer that writes to
the residual stream gets as its goal

    y* = (dense residual stream after the layer) − (pruned residual stream before the layer),

so that it also repairs what earlier layers did wrong. Nothing is assumed about names: which layer writes where is
found by silencing each layer once on a short probe and looking at what changes.
"""

from dataclasses import dataclass, field
from typing import Callable, Optional

import torch
from torch import Tensor, nn

from ..calibration import Gram, _Calls, _experts_one_by_one, _inference, _Stop, collect
from ..targets import Target, find_blocks

PROBE_TOKENS = 32


@dataclass
class Goal:
    """What a layer should put out, over the tokens of its `Gram`: Σ y* xᵀ (out, in) and Σ y* (out,), fp32."""

    cross: Tensor
    total: Tensor

    def add(self, outputs: Tensor, inputs: Tensor) -> None:
        """`outputs` y* (tokens, out) fp32 and `inputs` x (tokens, in) of one batch."""
        self.cross.addmm_(outputs.t(), inputs.float())
        self.total += outputs.sum(0)


@dataclass
class Stage:
    """Targets that are measured together.

    `writer` adds its output to the residual stream, which is then seen as the input of the submodule called `place`,
    or as the block's output where `place` is empty. `last` is the module whose inputs end the measuring pass.
    """

    targets: list[Target] = field(default_factory=list)
    writer: Optional[Target] = None
    place: str = ""
    last: Optional[nn.Module] = None


def staged(
    model: nn.Module,
    rows: Tensor,
    targets: list[Target],
    visit: Callable[[list[Target], dict[str, Gram], dict[str, Goal]], None],
    batch_size: int = 8,
    on_block: Optional[Callable[[int, int], None]] = None,
    skip: Optional[Callable[[list[Target]], bool]] = None,
    finish: Optional[Callable[[list[Target]], None]] = None,
) -> None:
    """Calls `visit(targets, grams, goals)` for each stage of each block, on inputs that pruned layers computed.

    Two hidden states per token are kept, dense and pruned, and for the block at hand the dense residual stream after
    each writer, all in the model's dtype. Targets outside every block come last.

    Args:
        rows: token ids, int64 (n, sequence_length).
        visit: prunes the targets it is given; `goals` holds only the layers that write to the residual stream.
        on_block: progress; called with (done, total) after each block.
        skip: called with a block's targets before anything is measured; True = they are pruned already.
        finish: called with a block's targets when all of them are pruned.
    """
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    rows = rows.to(device)
    batches = rows.split(batch_size)
    with _inference(model), _experts_one_by_one(targets):
        calls = _Calls(model, blocks)
        dense = [calls.first_inputs(batch) for batch in batches]
        short = _Calls(model, blocks)  # its own: what a block is given depends on batch size and length
        probe = short.first_inputs(rows[:1, :PROBE_TOKENS])
        pruned = list(dense)
        for index, (name, block) in enumerate(blocks):
            own = [t for t in targets if t.module_name.startswith(name + ".")]
            plan = _plan(block, name, own, lambda: short.run(index, probe)) if own else []
            after = _run_dense(block, plan, lambda states: calls.run(index, states), dense)
            probe = short.run(index, probe)
            if own and not (skip and skip(own)):
                for stage in plan:
                    run = [lambda states=states: calls.run(index, states) for states in pruned]
                    wanted = dense if stage.place == "" else after[stage.place]
                    visit(stage.targets, *_measure(block, stage, run, wanted))
                if finish:
                    finish(own)
            after.clear()
            for i, states in enumerate(pruned):
                pruned[i] = calls.run(index, states)
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
    """Moves the dense stream through a block; returns it as seen at each writer's place, by batch."""
    after: dict[str, list[Tensor]] = {stage.place: [] for stage in plan if stage.writer and stage.place}
    handles = [
        block.get_submodule(place).register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
        for place, kept in after.items()
    ]
    for i, states in enumerate(dense):
        dense[i] = run(states)
    for handle in handles:
        handle.remove()
    return after


def _measure(block: nn.Module, stage: Stage, runs: list, wanted: list[Tensor]):
    """(grams, goals) of one stage; each pass over a batch ends as soon as the stage has been seen."""
    writer = stage.writer
    goals: dict[str, Goal] = {}
    seen: dict[str, Tensor] = {}
    if writer:
        zeros = torch.zeros(writer.shape, device=writer.parameter.device)
        goals[writer.name] = Goal(zeros, zeros.new_zeros(writer.shape[0]))

    def silence(_, args, out):
        seen["inputs"] = args[0].reshape(-1, args[0].shape[-1])
        return torch.zeros_like(out)

    def arrive(_, args):
        seen["before"] = args[0]
        raise _Stop

    def stop(*_):
        raise _Stop

    def forward() -> None:
        # Registered here, after the hooks that feed the grams, so that those run first.
        handles = []
        if writer:
            handles.append(writer.module.register_forward_hook(silence))
            if stage.place:
                handles.append(block.get_submodule(stage.place).register_forward_pre_hook(arrive))
        elif stage.last is not None:
            handles.append(stage.last.register_forward_pre_hook(stop))
        try:
            for run, after in zip(runs, wanted):
                try:
                    seen["before"] = run()
                except _Stop:
                    pass
                if writer:
                    goal = after.float() - seen["before"].float()
                    goals[writer.name].add(goal.reshape(-1, goal.shape[-1]), seen["inputs"])
        finally:
            for handle in handles:
                handle.remove()

    return collect(block, stage.targets, forward), goals


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
    places = _places(block, [t for t in order if t.expert is None], run)
    result = []
    for stage in stages:
        writers = [t for t in stage.targets if t.name in places]
        if len(writers) == 1:
            stage.writer, stage.place = writers[0], places[writers[0].name]
            # Silencing one layer must not reach the others of its stage, which read the same tensor anyway.
        result.append(stage)
    uncalled = [t for t in own if t not in order]
    if uncalled:  # experts in a list to which no token of the probe came: measured over a whole pass, at the end
        result.append(Stage(uncalled))
    return result


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


def _places(block: nn.Module, candidates: list[Target], run: Callable[[], Tensor]) -> dict[str, str]:
    """By target name: where its output is found *added* to a residual stream, the earliest place first.

    A place is the input of a submodule that is called once, or the block's output (""). A layer writes there if the
    value differs from the one with the layer silenced by exactly the layer's output, and something was there before.
    """
    plain, outputs = _observe(block, candidates, run)
    found = {}
    for target in candidates:
        output = outputs.get(target.name)
        if output is None or output.shape != plain[""].shape:
            continue
        silent, _ = _observe(block, candidates, run, target.module)
        for place, value in plain.items():
            before = silent.get(place)
            if before is None or value.shape != output.shape or not value.is_floating_point():
                continue
            value, before, change = value.float(), before.float(), output.float()
            rounding = 8 * torch.finfo(output.dtype).eps * value.norm()
            if before.norm() > 0 and (value - before - change).norm() <= 1e-4 * change.norm() + rounding:
                found[target.name] = place
                break
    return found


def _observe(block: nn.Module, candidates: list[Target], run, silenced: Optional[nn.Module] = None):
    """Inputs of the block's submodules by name in the order of their calls, with the block's output last under "";
    outputs of `candidates` by name. `silenced` puts out zeros."""
    values: dict[str, Tensor] = {}
    repeated: set[str] = set()
    outputs: dict[str, Tensor] = {}

    def note(place: str):
        def hook(_, args):
            if args and isinstance(args[0], Tensor):
                repeated.add(place) if place in values else values.__setitem__(place, args[0])
        return hook

    def output(target: Target):
        def hook(module, _, out):
            outputs[target.name] = out
            return torch.zeros_like(out) if module is silenced else None
        return hook

    handles = [m.register_forward_pre_hook(note(n)) for n, m in block.named_modules() if n]
    handles += [t.module.register_forward_hook(output(t)) for t in candidates]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    values = {place: value for place, value in values.items() if place not in repeated}
    values[""] = result
    return values, outputs
