"""Running statistics of weights and biases along training, in bounded memory.

Per parameter and statistic one bf16 tensor (2 bytes per parameter), of what this rank owns. Every gradient is
divided by the global gradient norm of its step first, so that clipping, loss scale, accumulation and engine make no
difference. A step whose gradient holds NaN or infinity on any rank is left out on all of them and counted, without
a host synchronisation.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Optional

import torch
from torch import Tensor

from ..engines import ranks
from ..engines.shard import Shard, fused_groups, group_of
from ..errors import MamaError, warn_once
from ..masks.files import FOLDER, RangeReader, write_ranges

logger = logging.getLogger(__name__)
STEM = "statistics"
# Increments below 1/64 of a bf16 value would mostly be rounded away, so the mean forgets beyond 64 steps.
WINDOW = 64
DTYPE = torch.bfloat16  # of the statistics; fp32 compares engines more finely, at twice the memory
_HUGE = 3e38


@dataclass(frozen=True)
class Rule:
    """How a statistic is made, and how it becomes an indicator.

    Args:
        of_step: in place, what of one step's products w g / ‖g‖ the statistic is the running mean of.
        of_mean: the indicator, of the mean (fp32); rising, so that either gives the same order.
    """

    of_step: Callable[[Tensor], Tensor]
    of_mean: Callable[[Tensor], Tensor] = lambda mean: mean


# The sensitivity is |w g| (Molchanov et al., arXiv 1906.10771), movement −w g, positive when training pushes the weight
# away from zero (arXiv 2005.07683, eq. 4), and the reward's indicator the root mean square of w g of the GRPO loss.
RULES: dict[str, Rule] = {
    "sensitivity": Rule(Tensor.abs_),
    "movement": Rule(Tensor.neg_),
    "reward": Rule(Tensor.square_, Tensor.sqrt),
}


class Trajectory:
    """Running means over steps of every shard's statistics: see `RULES`.

    `values[statistic][name]` is bf16, in the parameter's shape, or (owned,) where ranks share the parameter.

    Args:
        shards: weights and biases to follow.
        statistics: names out of `RULES`.
    """

    def __init__(self, shards: list[Shard], statistics: list[str]):
        self.shards = shards
        self.group = group_of(shards)
        self.statistics = list(statistics)
        self._flat: dict[str, dict[str, Tensor]] = {
            name: {s.name: torch.zeros_like(s.master, dtype=DTYPE) for s in shards}
            for name in self.statistics
        }
        self.values = {
            name: {s.name: flat[s.name].view(s.shape) if s.length == s.numel else flat[s.name] for s in shards}
            for name, flat in self._flat.items()
        }
        device = shards[0].parameter.device
        # One count per statistic: the reward statistic starts when GRPO starts, sensitivity goes on.
        self.counts = {name: torch.zeros((), device=device) for name in self.statistics}
        self.skipped = torch.zeros((), device=device)
        self.history: list[dict] = []
        self._groups = fused_groups(shards)
        self._scratch = torch.empty(0)

    @torch.no_grad()
    def record(self, names: Optional[tuple[str, ...]] = None) -> None:
        """Takes one optimizer step's gradients in; call just before the optimizer moves the weights. Collective.

        `names` limits which statistics are updated; None updates all.
        """
        chosen = [name for name in self.statistics if names is None or name in names]
        gradients = {shard.name: grad for shard in self.shards if (grad := shard.gradient) is not None}
        if not chosen or not gradients:
            return
        square = self._square_norm([gradient for gradient in gradients.values() if gradient.numel()])
        norm = ranks.total(square, self.group).sqrt()
        finite = torch.isfinite(norm)
        self.skipped += (~finite).float()
        usable = finite & (norm > 0)  # a GRPO step without any advantage says nothing
        scale = torch.where(usable, 1.0 / norm, 0.0)
        rates = {}
        for name in chosen:
            self.counts[name] += usable.float()
            rates[name] = torch.where(usable, 1.0 / self.counts[name].clamp(1, WINDOW), 0.0)
        if norm.device.type == "cpu" and not usable:
            return  # asking costs nothing here; a GPU goes on with rate 0 rather than wait for the answer
        masters = {shard.name: shard.master for shard in self.shards}
        for group in self._groups:
            members = [(s.name, begin, end) for s, begin, end in group if s.name in gradients]
            if members:
                self._blend(chosen, members, masters, gradients, scale, rates)

    def _square_norm(self, gradients: list[Tensor]) -> Tensor:
        """Σ g² over this rank's part, fp32 scalar."""
        total = torch.zeros((), device=self.skipped.device)
        if gradients:
            norms = torch._foreach_norm(gradients, 2, torch.float32)  # fp16 overflows beyond a norm of 65,504
            total += torch.stack([norm.to(total.device) for norm in norms]).square().sum()
        return total

    def _blend(
        self, names: list[str], members: list[tuple[str, int, int]], masters: dict[str, Tensor],
        gradients: dict[str, Tensor], scale: Tensor, rates: dict[str, Tensor],
    ) -> None:
        """statistic += rate · (f(w g / ‖g‖) − statistic) for one group, with one buffer for all its parameters."""
        first = masters[members[0][0]]
        sizes = [end - begin for _, begin, end in members]
        buffer = self._buffer(first.device, sum(sizes))
        parts = list(buffer.split(sizes))
        for part, (name, begin, end) in zip(parts, members):
            torch.mul(masters[name][begin:end].float(), gradients[name][begin:end], out=part)
        buffer.mul_(scale.to(first.device))
        for number, name in enumerate(names):
            # The last statistic may use the products up.
            new = buffer if number == len(names) - 1 else buffer.clone()
            RULES[name].of_step(new)
            if first.device.type != "cpu":
                # NaN and infinity become numbers that the rate 0 of a bad step cancels; 0 times NaN would be NaN.
                torch.fmin(new, torch.full_like(new[:1], _HUGE), out=new)
                torch.fmax(new, torch.full_like(new[:1], -_HUGE), out=new)
            statistics = [self._flat[name][key][begin:end] for key, begin, end in members]
            pieces = list(new.split(sizes))
            torch._foreach_sub_(pieces, statistics)
            new.mul_(rates[name].to(first.device))
            torch._foreach_add_(statistics, pieces)

    def _buffer(self, device: torch.device, size: int) -> Tensor:
        """fp32 scratch, made anew each time on a GPU, whose allocator keeps it, and held on a CPU."""
        if device.type != "cpu":
            return torch.empty(size, device=device)
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size)
        return self._scratch[:size]

    def importance(self, name: str) -> dict[str, Tensor]:
        """The indicator per parameter, fp32, shaped like `values`."""
        return {key: RULES[name].of_mean(tensor.float()) for key, tensor in self.values[name].items()}

    def recorded(self, name: str) -> bool:
        return name in self.values and bool(self.counts[name] > 0)

    def flat(self, statistic: str, name: str) -> Tensor:
        """The raw statistic of what this rank owns of parameter `name`, bf16 (owned,)."""
        return self._flat[statistic][name]

    def save(self, folder: str | Path) -> Path:
        """Writes `folder/mama/statistics.safetensors`, or this rank's part of it, atomically; returns its path."""
        ranges = {shard.name: (shard.start, shard.length) for shard in self.shards}
        tensors = {f"{name}/{key}": flat for name, group in self._flat.items() for key, flat in group.items()}
        header = {
            "format": "mama-statistics-3",
            "shapes": {shard.name: shard.shape for shard in self.shards},
            "counts": {name: int(count) for name, count in self.counts.items()},
            "skipped": int(self.skipped),
            "history": self.history,
        }
        return write_ranges(folder, STEM, tensors, {k: ranges[k.split("/", 1)[1]] for k in tensors}, header, self.group)

    def load(self, folder: str | Path, resume: bool) -> bool:
        """Takes up what an earlier stage (or, with `resume`, this run) saved; False if there is nothing.

        Statistics that the file has and this run does not follow are left out; across stages the reward's
        mean starts anew only where it was never recorded, and all of them do after a stage that left some of these
        matrices out. Raises `MamaError` if the file belongs to another model or is damaged.
        """
        reader = RangeReader.find(folder, STEM)
        if reader is None:
            return False
        where, header = Path(folder) / FOLDER, reader.header
        stored = {name: tuple(shape) for name, shape in header["shapes"].items()}
        followed = [shard.name in stored for shard in self.shards]
        if not resume and any(followed) and not all(followed):
            warn_once(logger, f"{where} has statistics of some of this run's matrices: those of all start anew.")
            return False
        for name in [name for name in self.statistics if name in header["counts"]]:
            for shard in self.shards:
                if stored.get(shard.name) != shard.shape:
                    found = f"shape {list(stored[shard.name])}" if shard.name in stored else "nothing"
                    raise MamaError(
                        f"{where} holds {found} for {shard.name}, whose shape is {list(shard.shape)}: it belongs to "
                        "another model; delete it, or set inherit_masks to false."
                    )
                self._flat[name][shard.name].copy_(reader.read(f"{name}/{shard.name}", shard.start, shard.length))
            self.counts[name].fill_(header["counts"][name])
        self.history = header["history"]
        if resume:
            self.skipped.fill_(header["skipped"])
        return True
