"""Refines a pruned block towards the dense stream behind it: Adam on what it kept, one block in memory.

Each layer's own problem knows nothing of what the others of its block do with the outputs. Here all kept weights, norms
and biases of a block move together, on the same calibration sequences. Some of these are held back: the best state on
them is what stays, so that the block's error there is never higher than before.
"""

import logging
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor, nn

from ..model.targets import Target

logger = logging.getLogger(__name__)


@dataclass
class Refiner:
    """How blocks are refined.

    Args:
        epochs: passes over the sequences that are not held back, at most.
        rate: Adam's first step size relative to the root mean square of each tensor; it falls linearly to zero.
        patience: epochs without an improvement on the held-back sequences after which a block is done.
        held_back: one batch in so many is held back.
    """

    epochs: int = 10
    rate: float = 0.01
    patience: int = 2
    held_back: int = 6

    @torch.no_grad()
    def refine(
        self, block: nn.Module, own: list[Target], masks: dict[str, Tensor], run: Callable[[Tensor], Tensor],
        inputs: list[Tensor], wanted: list[Tensor],
    ) -> float:
        """Changes the block's parameters in place; returns its held-back error relative to the one before.

        Args:
            own: the block's targets.
            masks: bool (out, in) by target name; pruned connections stay at zero.
            run: the block on hidden states.
            inputs, wanted: hidden states by batch: what the pruned blocks before it put out, and the dense stream
                behind it.
        """
        if len(inputs) < 2:
            return 1.0  # nothing to hold back
        apart = set(range(0, len(inputs), min(self.held_back, len(inputs))))
        train = [i for i in range(len(inputs)) if i not in apart]
        dtypes = {name: p.dtype for name, p in block.named_parameters()}
        block.float()
        states = [states.float() for states in inputs]
        goals = [states.float() for states in wanted]
        moving = [p for p in block.parameters() if p.dim() > 0]
        kept = [(t, masks[t.name]) for t in own if t.name in masks]

        def error() -> float:
            return sum(float((run(states[i]) - goals[i]).square().sum()) for i in apart)

        before = best = error()
        state = [p.detach().clone() for p in moving]
        sizes = [float(p[p != 0].square().mean().sqrt()) if bool((p != 0).any()) else 0.0 for p in moving]
        required = [p.requires_grad for p in moving]
        adam = torch.optim.Adam([
            {"params": [p], "lr": self.rate * (size or 1e-2)} for p, size in zip(moving, sizes)
        ], betas=(0.9, 0.98))
        first = [group["lr"] for group in adam.param_groups]
        steps, step, waited = self.epochs * len(train), 0, 0
        try:
            for p in moving:
                p.requires_grad_(True)
            for epoch in range(self.epochs):
                for i in torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch)).tolist():
                    for group, rate in zip(adam.param_groups, first):
                        group["lr"] = rate * (1 - step / steps)
                    with torch.enable_grad():
                        loss = (run(states[train[i]]) - goals[train[i]]).square().mean()
                    loss.backward()
                    adam.step()
                    adam.zero_grad()
                    for target, mask in kept:
                        target.matrix.mul_(mask)
                    step += 1
                now = error()
                waited = 0 if now < best else waited + 1
                if now < best:
                    best = now
                    for saved, p in zip(state, moving):
                        saved.copy_(p)
                if waited > self.patience:
                    break
        finally:
            for p, saved, needed in zip(moving, state, required):
                p.copy_(saved)
                p.requires_grad_(needed)
                p.grad = None
            for name, p in block.named_parameters():
                p.data = p.data.to(dtypes[name])
        return best / max(before, 1e-30)
