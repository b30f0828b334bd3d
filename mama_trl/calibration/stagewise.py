"""Calibrates a block group by group, in the order in which it computes, towards what the dense model puts out.

    dense   X ════════════╦═══════════════╦══════════════════╦═══════════════╗
                     norm₁(X)         X at norm₂         norm₂(X)       X at OUTPUT
                          ▼               ▼                  ▼               ▼
    goals             W norm₁(X)        X − Z            W norm₂(X)        X − Z
                          ▼               ▼                  ▼               ▼
    pruned  Z ═══════ q, k, v ═══════════ o ═════════════ gate, up ═════════ down ═▶

SparseGPT and its kin measure a whole block while it is still dense, and ask each layer to repeat its own dense outputs.
Here each layer group (plan.py) is measured on inputs that the pruned layers before it computed, and a second stream of
hidden states runs through the dense blocks beside the pruned one. A layer that writes to the residual stream is asked
for the dense stream behind it minus the pruned stream before it, so that it also repairs what earlier layers lost; one
that reads a norm of the stream is asked for the outputs that it has in the dense model, not for those that its dense
weight makes of disturbed inputs.
"""

from contextlib import ExitStack
from functools import partial
from typing import Callable, Iterator, Optional

import torch
from torch import Tensor, nn

from ..engines.offload import running_device
from ..model.blocks import find_blocks
from ..model.runner import BlockRunner, Stop, experts_one_by_one, inference
from ..model.sequences import Sequences, batches
from ..model.targets import Target
from ..solvers.problem import Goal, Gram
from .blockwise import measured_outside
from .grams import Measured, collect, first_of
from .plan import INPUT, OUTPUT, LayerGroup, plan_groups, rms, silenced, startable_segments, tokens_of, uncomputed
from .progress import Progress
from .refine import Refiner
from .source import BlocksInPlace

PROBE_TOKENS = 32


def stagewise(
    model: nn.Module,
    sequences: Sequences,
    targets: list[Target],
    progress: Progress,
    batch_size: int = 8,
    source: Optional[BlocksInPlace] = None,
    refiner: Optional[Refiner] = None,
    repair: bool = True,
) -> Iterator[Measured]:
    """Yields grams and goals of each layer group of each block, on inputs that pruned layers compute.

    Two hidden states per token are kept, dense and pruned, and for a while one more, all in the model's dtype: the
    inputs of the attention's output layer where the block can be started behind its attention, or else the dense
    residual stream in the middle of the block. Targets outside every block come last. To be closed
    (`contextlib.closing`) where it is not exhausted, so that the model is left as it was.

    Args:
        sequences: token ids, int64 (n, sequence_length), or 1-D tensors of any lengths; another rank may have others,
            in another number.
        progress: a block that it holds is restored instead of measured.
        refiner: changes each block once it is pruned; default none does.
        repair: whether a layer that writes to the residual stream is asked for what the pruned stream lacks there; else
            for its own outputs in the dense model.
        source: gives each block in a form that this process can run alone; default as it stands in the model.
    """
    source = source if source is not None else BlocksInPlace()
    blocks = find_blocks(model)
    parts = batches(sequences, batch_size, running_device(model))
    passes = source.passes(len(parts))
    progress.begin(len(blocks))
    with inference(model), experts_one_by_one(targets):
        runner = BlockRunner(model, blocks, source.may_stop)
        dense = [runner.first_inputs(part) for part in parts]
        for _ in range(len(parts), passes):
            runner.first_inputs(parts[-1])
        # Its own: what a block is given depends on the batch's shape, and the real ones must not be overwritten.
        short = BlockRunner(model, blocks, source.may_stop)
        probe = short.first_inputs(source.broadcast_tokens(parts[0][0, :PROBE_TOKENS]).unsqueeze(0))
        pruned = list(dense)
        for index, (name, block) in enumerate(blocks):
            own = [t for t in targets if t.module_name.startswith(name + ".")]
            block, own = source.take(index, name, block, own)
            runner.put(index, block)
            short.put(index, block)
            done = bool(own) and progress.holds(own)
            groups = [] if done else plan_groups(block, own, lambda states: short.run(index, states), probe)
            probe = short.run(index, probe)
            run = partial(runner.run, index)
            # Experts get no goals of their own, and where half a block repairs, the other half reads what it never saw.
            mixture = any(t.of_mixture for t in own)
            walk = _Walk(block, run, dense, pruned, repair and not mixture)
            inputs = list(pruned) if refiner and own and not done else []
            others = _others(name, block, own) if refiner else {}
            with ExitStack() as behind:
                for segment in startable_segments(groups):
                    yield from walk.through(segment, (lambda: progress.restore(own, others)) if done else None)
                    if segment and segment[-1].whole is not None:
                        behind.enter_context(silenced(segment[-1].whole))
            if inputs:
                refiner.refine(block, own, progress.masks, run, inputs, dense)
                for i, states in enumerate(inputs):
                    pruned[i] = runner.run(index, states)
            if own and not done:
                progress.finish(own, others)
            source.release(index)
            progress.advance()
        dense.clear()
        pruned.clear()
        outside = [t for t in targets if t.block is None]
        yield from measured_outside(model, parts, outside, progress, passes)


def _others(name: str, block: nn.Module, own: list[Target]) -> dict[str, Tensor]:
    """The block's parameters by name that are neither weights nor biases of its targets."""
    known = {id(t.parameter) for t in own} | {id(getattr(t.module, t.bias_attribute)) for t in own if t.bias_attribute}
    return {f"{name}.{key}": p.data for key, p in block.named_parameters() if id(p) not in known}


class _Walk:
    """Moves both streams of hidden states through one block, segment by segment, and prunes on the way.

    Args:
        run: the block on hidden states.
        dense, pruned: hidden states by batch, replaced in place.
    """

    def __init__(
        self, block: nn.Module, run: Callable[[Tensor], Tensor], dense: list[Tensor], pruned: list[Tensor],
        repair: bool,
    ):
        self._block, self._run, self._repair = block, run, repair
        self._dense, self._pruned = dense, pruned
        self._at = INPUT

    def through(self, segment: list[LayerGroup], restore: Optional[Callable[[], None]] = None) -> Iterator[Measured]:
        """Yields what is measured of each group; `restore` changes the weights once the dense stream is past them."""
        end = segment[-1] if segment and segment[-1].whole is not None else None
        # The first group's inputs need no pruned layer of this segment, so it is measured before the dense stream
        # moves on: then the stream before the segment need not be kept.
        early = segment and segment[0].writer is None
        found = self._measured(segment[0], {self._at: self._dense}) if early else None
        streams = self._move_dense(segment, end.place if end else OUTPUT)
        inputs: list[Tensor] = []
        if restore:
            restore()
        for number, group in enumerate(segment):
            if found is None:
                found = self._measured(group, streams, inputs if group is end else None)
            yield Measured(group.targets, *found)
            found = None
            later = {place for other in segment[number + 1 :] for place in (other.place, other.source, _outputs(other))}
            for place in set(streams) - later:
                del streams[place]
        if end:
            # What the block's first half would compute anew, from the inputs of its last layer.
            for i, (states, given) in enumerate(zip(self._pruned, inputs)):
                added = end.writer.module(given)
                self._pruned[i] = states + (end.post.module(added) if end.post else added).view_as(states)
            self._at = end.place
        else:
            for i, states in enumerate(self._pruned):
                self._pruned[i] = self._run(states)

    def _move_dense(self, segment: list[LayerGroup], end: str) -> dict[str, list[Tensor]]:
        """Moves the dense stream to `end`; its states, by batch, at every place that groups after the first need."""
        places = {place for group in segment for place in (group.place, group.source) if place}
        streams: dict[str, list[Tensor]] = {place: [] for place in places - {self._at, end, OUTPUT}}
        if any(group.source == self._at for group in segment[1:]):  # a parallel block: its MLP reads the same
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
        for group in [] if self._repair else segment:
            if group.writer:
                own = streams[_outputs(group)] = []
                handles.append(group.writer.module.register_forward_hook(lambda _, args, out, own=own: own.append(out)))
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

    def _measured(self, group: LayerGroup, streams: dict[str, list[Tensor]], kept: Optional[list[Tensor]] = None):
        return _measure(self._block, group, self._run, self._pruned, streams, kept)


def _outputs(group: LayerGroup) -> str:
    """Under which name the outputs of a group's writer in the dense model are kept, where they are its goal."""
    return f"(outputs of {group.writer.name})" if group.writer else ""


def _measure(
    block: nn.Module,
    group: LayerGroup,
    run: Callable[[Tensor], Tensor],
    pruned: list[Tensor],
    streams: dict[str, list[Tensor]],
    kept: Optional[list[Tensor]] = None,
) -> tuple[dict[str, Gram], dict[str, Goal]]:
    """(grams, goals) of one group; each pass over a batch of `pruned` ends as soon as the group has been seen.

    The writer's inputs are appended to `kept`.
    """
    writer, first = group.writer, group.targets[0]
    seen: dict[str, Tensor] = {}
    goal = pairs = None
    if writer:
        cross = torch.zeros(writer.shape, device=writer.parameter.device)
        goal = Goal(cross, cross.new_zeros(writer.shape[0]))
        weighted = Gram.zeros(writer.shape[1], cross.device) if group.post else None
    elif group.norm is not None:
        pairs = torch.zeros(first.shape[1], first.shape[1], device=first.parameter.device)
        pairs = Goal(pairs, pairs.new_zeros(first.shape[1]))

    def silence(_, args, kwargs, out):
        seen["inputs"] = first_of(args, kwargs)
        seen["outputs"] = out  # of the weight as it is, on inputs that pruned layers made
        return torch.zeros_like(out)

    def arrive(_, args):
        seen["before"] = args[0]
        raise Stop

    def stop(_, args, kwargs):
        seen["inputs"] = first_of(args, kwargs)
        raise Stop

    def forward() -> None:
        # Registered here, after the hooks that feed the grams, so that those run first.
        handles, muted = [], ExitStack()
        if writer:
            handles.append(writer.module.register_forward_hook(silence, with_kwargs=True))
            if not group.post:
                muted.enter_context(uncomputed(writer.module, writer.shape[0]))
            if group.place != OUTPUT:
                handles.append(block.get_submodule(group.place).register_forward_pre_hook(arrive))
        elif group.last is not None:
            handles.append(group.last.register_forward_pre_hook(stop, with_kwargs=True))
        try:
            for i, states in enumerate(pruned):
                try:
                    seen["before"] = run(states)
                except Stop:
                    pass
                if kept is not None:
                    kept.append(seen["inputs"])
                if writer and _outputs(group) in streams:
                    goal.add(tokens_of(streams[_outputs(group)][i]), tokens_of(seen["inputs"]))
                elif writer:
                    wanted = tokens_of(streams[group.place][i]) - tokens_of(seen["before"])
                    inputs = tokens_of(seen["inputs"])
                    if weighted:
                        # N(y) = gain y / rms(y): what N should put out says which way y must point, in units of
                        # its rms.
                        scale = rms(tokens_of(seen["outputs"]))
                        wanted, inputs = wanted / group.post.gain, inputs / scale
                        weighted.add(inputs)
                    goal.add(wanted, inputs)
                elif pairs is not None:
                    wanted = group.norm(streams[group.source][i])
                    pairs.add(tokens_of(wanted), tokens_of(seen["inputs"]))
        finally:
            muted.close()
            for handle in handles:
                handle.remove()

    grams = collect(block, group.targets, forward, share=not group.apart)
    if writer:
        return ({writer.name: weighted} if weighted and weighted.tokens else grams), {writer.name: goal}
    if pairs is None:
        return grams, {}
    return grams, {
        t.name: Goal.of_inputs(
            t.matrix.float(), None if t.bias is None else t.bias.detach().float(), pairs.cross, pairs.total,
            grams[t.name],
        )
        for t in group.targets
    }
