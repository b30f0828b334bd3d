"""Calibration in the order in which a block computes, towards what the dense model puts out.

SparseGPT and its kin measure a whole block while it is still dense, and ask each layer to repeat its own dense outputs.
Here a block is pruned stage by stage: layers that read the same tensor (query, key, value; then the attention's output;
then gate, up; then down) are one stage, and each stage is measured on inputs that the pruned layers before it
computed. A second stream of hidden states runs through the dense blocks beside the pruned one. A layer that writes to
the residual stream gets as its goal

    y* = (dense residual stream after the layer) − (pruned residual stream before the layer),

so that it also repairs what earlier layers did wrong; a layer that reads a norm of the residual stream is asked for
the outputs that it has in the dense model, not for those that its dense weight makes of disturbed inputs. Which layer
reads and writes what is found in plan.py.
"""

from contextlib import ExitStack
from typing import Callable, Optional

import torch
from torch import Tensor, nn

from ..model.blocks import find_blocks
from ..model.runner import BlockRunner, Stop, experts_one_by_one, inference
from ..model.targets import Target
from ..pruning.placement import LocalPlacement
from ..solvers.problem import Goal, Gram
from .grams import collect
from .plan import INPUT, OUTPUT, Stage, plan_stages, segments, silenced, tokens_of

PROBE_TOKENS = 32


def staged(
    model: nn.Module,
    rows: Tensor,
    targets: list[Target],
    visit: Callable[[list[Target], dict[str, Gram], dict[str, Goal]], None],
    batch_size: int = 8,
    on_block: Optional[Callable[[int, int], None]] = None,
    skip: Optional[Callable[[list[Target]], bool]] = None,
    restore: Optional[Callable[[list[Target]], None]] = None,
    finish: Optional[Callable[[list[Target]], None]] = None,
    placement: Optional[LocalPlacement] = None,
) -> None:
    """Calls `visit(targets, grams, goals)` for each stage of each block, on inputs that pruned layers computed.

    Two hidden states per token are kept, dense and pruned, and for a while one more, all in the model's dtype: the
    inputs of the attention's output layer where the block can be started behind its attention, or else the dense
    residual stream in the middle of the block. Targets outside every block come last.

    Args:
        rows: token ids, int64 (n, sequence_length).
        visit: prunes the targets it is given; `goals` holds those layers for which there is a goal.
        on_block: progress; called with (done, total) after each block.
        skip: called with a block's targets before anything is measured; True = an earlier run has pruned them.
        restore: writes what that run made of them into the model.
        finish: called with a block's targets when all of them are pruned.
        placement: gives each block in a form that this process can run alone; default as it stands in the model.
    """
    placement = placement if placement is not None else LocalPlacement()
    blocks = find_blocks(model)
    device = next(model.parameters()).device
    rows = rows.to(device)
    batches = rows.split(batch_size)
    with inference(model), experts_one_by_one(targets):
        calls = BlockRunner(model, blocks, placement.may_stop)
        dense = [calls.first_inputs(batch) for batch in batches]
        # Its own: what a block is given depends on batch size and length.
        short = BlockRunner(model, blocks, placement.may_stop)
        probe = short.first_inputs(placement.same(rows[:1, :PROBE_TOKENS]))
        pruned = list(dense)
        for index, (name, block) in enumerate(blocks):
            own = [t for t in targets if t.module_name.startswith(name + ".")]
            block, own = placement.runnable(index, name, block, own)
            calls.put(index, block)
            short.put(index, block)
            done = bool(own and skip and skip(own))
            stages = plan_stages(block, own, lambda states: short.run(index, states), probe) if own and not done else []
            probe = short.run(index, probe)
            walk = _Walk(block, lambda states: calls.run(index, states), dense, pruned)
            with ExitStack() as behind:
                for segment in segments(stages):
                    walk.through(segment, visit, (lambda: restore(own)) if done else None)
                    if segment and segment[-1].whole is not None:
                        behind.enter_context(silenced(segment[-1].whole))
            if own and not done and finish:
                finish(own)
            placement.release(index)
            if on_block:
                on_block(index + 1, len(blocks))
        dense.clear()
        pruned.clear()
        outside = [t for t in targets if t.block is None]
        if outside and skip and skip(outside):
            restore(outside)
        elif outside:
            visit(outside, collect(model, outside, lambda: [model(input_ids=b, use_cache=False) for b in batches]), {})
            if finish:
                finish(outside)


class _Walk:
    """Moves both streams of hidden states through one block, segment by segment, and prunes on the way.

    Args:
        run: the block on hidden states.
        dense, pruned: hidden states by batch, replaced in place.
    """

    def __init__(self, block: nn.Module, run: Callable[[Tensor], Tensor], dense: list[Tensor], pruned: list[Tensor]):
        self._block, self._run = block, run
        self._dense, self._pruned = dense, pruned
        self._at = INPUT

    def through(self, segment: list[Stage], visit, restore: Optional[Callable[[], None]] = None) -> None:
        """`restore` changes the weights once the dense stream has passed them."""
        end = segment[-1] if segment and segment[-1].whole is not None else None
        # The first stage's inputs need no pruned layer of this segment, so it is measured before the dense stream
        # moves on: then the stream before the segment need not be kept.
        early = segment and segment[0].writer is None
        found = self._measured(segment[0], {self._at: self._dense}) if early else None
        streams = self._move_dense(segment, end.place if end else OUTPUT)
        inputs: list[Tensor] = []
        if restore:
            restore()
        for number, stage in enumerate(segment):
            if found is None:
                found = self._measured(stage, streams, inputs if stage is end else None)
            visit(stage.targets, *found)
            found = None
            later = {place for other in segment[number + 1 :] for place in (other.place, other.source)}
            for place in set(streams) - later:
                del streams[place]
        if end:
            # What the block's first half would compute anew, from the inputs of its last layer.
            for i, (states, given) in enumerate(zip(self._pruned, inputs)):
                self._pruned[i] = states + end.writer.module(given).view_as(states)
            self._at = end.place
        else:
            for i, states in enumerate(self._pruned):
                self._pruned[i] = self._run(states)

    def _move_dense(self, segment: list[Stage], end: str) -> dict[str, list[Tensor]]:
        """Moves the dense stream to `end`; its states, by batch, at every place that stages after the first need."""
        places = {place for stage in segment for place in (stage.place, stage.source) if place}
        streams: dict[str, list[Tensor]] = {place: [] for place in places - {self._at, end, OUTPUT}}
        if any(stage.source == self._at for stage in segment[1:]):  # a parallel block: its MLP reads the same
            streams[self._at] = list(self._dense)
        arrived: list[Tensor] = []

        def arrive(_, args):
            arrived.append(args[0])
            raise Stop

        submodule = self._block.get_submodule
        handles = [
            submodule(place).register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0]))
            for place, kept in streams.items() if place != self._at
        ]
        if end != OUTPUT:
            handles.append(submodule(end).register_forward_pre_hook(arrive))
        try:
            for i, states in enumerate(self._dense):
                try:
                    self._dense[i] = self._run(states)
                except Stop:
                    self._dense[i] = arrived.pop()
        finally:
            for handle in handles:
                handle.remove()
        return {**streams, end: self._dense}

    def _measured(self, stage: Stage, streams: dict[str, list[Tensor]], kept: Optional[list[Tensor]] = None):
        return _measure(self._block, stage, self._run, self._pruned, streams, kept)


def _measure(
    block: nn.Module,
    stage: Stage,
    run: Callable[[Tensor], Tensor],
    pruned: list[Tensor],
    streams: dict[str, list[Tensor]],
    kept: Optional[list[Tensor]] = None,
) -> tuple[dict[str, Gram], dict[str, Goal]]:
    """(grams, goals) of one stage; each pass over a batch of `pruned` ends as soon as the stage has been seen.

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
        raise Stop

    def stop(_, args):
        seen["inputs"] = args[0]
        raise Stop

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
            for i, states in enumerate(pruned):
                try:
                    seen["before"] = run(states)
                except Stop:
                    pass
                if kept is not None:
                    kept.append(seen["inputs"])
                if writer:
                    wanted = tokens_of(streams[stage.place][i]) - tokens_of(seen["before"])
                    goal.add(wanted, tokens_of(seen["inputs"]))
                elif pairs is not None:
                    wanted = stage.norm(streams[stage.source][i])
                    pairs.add(tokens_of(wanted), tokens_of(seen["inputs"]))
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
