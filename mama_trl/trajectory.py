"""Running statistics of weights and biases along training, in bounded memory.

Per parameter and statistic one bf16 tensor (2 bytes per parameter). Every gradient is divided by the global
gradient norm of its step first, so that clipping, loss scale and accumulation cancel. A step whose gradient
holds NaN or infinity is left out and counted, without a host synchronisation.
"""

import json
from pathlib import Path
from typing import Optional

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import MamaError
from .masks import FOLDER, MaskSet, write_atomically
from .shards import Shard

FILE = "statistics.safetensors"
# Increments below 1/64 of a bf16 value would mostly be rounded away, so the mean forgets beyond 64 steps.
WINDOW = 64
SAMPLES = 2048  # connections whose values are written down for the report's trajectory plot


class Trajectory:
    """Statistics of every shard: `sensitivity` E|w g|, `movement` −Σ ρ w g, `reward` E (w g)².

    Args:
        shards: weights and biases to follow.
        statistics: names out of the three above. `reward` is the mean square; its root is the indicator.
        group: elements handled in one fused operation, which bounds the temporary memory.
    """

    def __init__(self, shards: list[Shard], statistics: list[str], group: int = 1 << 24):
        self.shards = shards
        self.statistics = list(statistics)
        self.values: dict[str, dict[str, Tensor]] = {
            name: {s.name: torch.zeros_like(s.master, dtype=torch.bfloat16) for s in shards}
            for name in self.statistics
        }
        device = shards[0].master.device
        # One count per statistic: the reward statistic starts when GRPO starts, sensitivity goes on.
        self.counts = {name: torch.zeros((), device=device) for name in self.statistics}
        self.skipped = torch.zeros((), device=device)
        self.history: list[dict] = []
        self._groups = _grouped(shards, group)

    @torch.no_grad()
    def record(self, names: Optional[tuple[str, ...]] = None) -> None:
        """Takes one optimizer step's gradients in; call just before `optimizer.step`.

        `names` limits which statistics are updated; None updates all.
        """
        names = [name for name in self.statistics if names is None or name in names]
        shards = [shard for shard in self.shards if shard.gradient is not None]
        if not shards:
            return
        norms = torch._foreach_norm([shard.gradient for shard in shards])
        gradient_norm = torch.stack([norm.float() for norm in norms]).norm()
        finite = torch.isfinite(gradient_norm) & (gradient_norm > 0)
        self.skipped += (~torch.isfinite(gradient_norm)).float()
        scale = torch.where(finite, 1.0 / gradient_norm, torch.zeros_like(gradient_norm))
        rates = {}
        for name in names:
            self.counts[name] += finite.float()
            rates[name] = torch.where(finite, 1.0 / self.counts[name].clamp(1, WINDOW), torch.zeros_like(scale))
        for group in self._groups:
            members = [shard for shard in group if shard.gradient is not None]
            if not members:
                continue
            products = torch._foreach_mul([s.master for s in members], [s.gradient for s in members])
            torch._foreach_mul_(products, scale)
            for product in products:
                product.nan_to_num_(0.0, 0.0, 0.0)  # 0 times NaN is NaN: a bad step must not reach the mean
            for name in names:
                self._blend(name, members, products, rates[name])

    def _blend(self, name: str, members: list[Shard], products: list[Tensor], rate: Tensor) -> None:
        if name == "sensitivity":
            new = torch._foreach_abs(products)
        elif name == "reward":
            new = torch._foreach_mul(products, products)
        else:
            new = torch._foreach_neg(products)
        for shard, value in zip(members, new):
            statistic = self.values[name][shard.name]
            statistic.copy_(torch.lerp(statistic.float(), value.float(), rate))

    def importance(self, name: str) -> dict[str, Tensor]:
        """The indicator per parameter, fp32, in parameter layout; the reward's mean square as its root."""
        values = {key: tensor.float() for key, tensor in self.values[name].items()}
        return {key: tensor.sqrt() for key, tensor in values.items()} if name == "reward" else values

    def histogram(self, name: str, masks: MaskSet, bins: int = 48) -> dict:
        """Bin counts of log10 of an indicator, relative to its mean, apart for kept and pruned connections.

        Taken at a mask update, since a pruned connection's attribution is zero ever after.
        """
        values = {key: value for key, value in self.importance(name).items() if key in masks.names}
        mean = sum(value.sum() for value in values.values()) / sum(value.numel() for value in values.values())
        edges = torch.linspace(-3, 2, bins + 1)
        counts = {"kept": torch.zeros(bins), "pruned": torch.zeros(bins)}
        for key, value in values.items():
            logs = (value / mean.clamp_min(1e-38)).clamp_min(1e-6).log10().clamp(-3, 2).cpu()
            mask = masks.mask(key).cpu()
            counts["kept"] += torch.histogram(logs[mask], edges).hist
            counts["pruned"] += torch.histogram(logs[~mask], edges).hist
        return {"edges_log10": edges.tolist(), **{key: value.long().tolist() for key, value in counts.items()}}

    def recorded(self, name: str) -> bool:
        return name in self.values and bool(self.counts[name] > 0)

    @torch.no_grad()
    def sample(self, step: int, stage: str, names: list[str]) -> None:
        """Writes down the values of a fixed random sample of connections, for the report."""
        shards = {shard.name: shard for shard in self.shards}
        values = take_sample([shards[name].master.reshape(-1) for name in names])
        self.history.append({"step": step, "stage": stage, "values": values.float().cpu().tolist()})

    def save(self, folder: str | Path) -> None:
        """Writes `folder/mama/statistics.safetensors` atomically."""
        tensors = {
            f"{name}/{key}": tensor.cpu().contiguous()
            for name, group in self.values.items()
            for key, tensor in group.items()
        }
        header = {
            "format": "mama-statistics-1",
            "counts": json.dumps({name: int(count) for name, count in self.counts.items()}),
            "skipped": str(int(self.skipped)),
            "history": json.dumps(self.history),
        }
        path = Path(folder) / FOLDER / FILE
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))

    def load(self, folder: str | Path, resume: bool) -> bool:
        """Takes up what an earlier stage (or, with `resume`, this run) saved; False if there is nothing.

        Statistics that the file has and this run does not follow are left out; across stages the reward's
        mean starts anew only where it was never recorded. Raises `MamaError` if the file belongs to another
        model or is damaged.
        """
        path = Path(folder) / FOLDER / FILE
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata()
                stored = {key: file.get_tensor(key) for key in file.keys()}
        except Exception as error:
            raise MamaError(f"{path} is no readable statistics file ({error}): delete it or restore it.") from error
        counts = json.loads(header["counts"])
        for name in self.statistics:
            if name not in counts:
                continue
            for key, tensor in self.values[name].items():
                old = stored.get(f"{name}/{key}")
                if old is None or old.shape != tensor.shape:
                    found = "nothing" if old is None else f"shape {list(old.shape)}"
                    raise MamaError(
                        f"{path} holds {found} for {key}, whose shape is {list(tensor.shape)}: it belongs to another "
                        "model; delete it, or set inherit_masks to false."
                    )
                tensor.copy_(old)
            self.counts[name].fill_(counts[name])
        self.history = json.loads(header["history"])
        if resume:
            self.skipped.fill_(int(header["skipped"]))
        return True


def take_sample(flats: list[Tensor], seed: int = 0) -> Tensor:
    """The same `SAMPLES` random positions of the concatenation of 1-D tensors, without concatenating them."""
    total = sum(flat.numel() for flat in flats)
    positions = torch.randint(total, (min(SAMPLES, total),), generator=torch.Generator().manual_seed(seed))
    positions = positions.sort().values
    parts, offset = [], 0
    for flat in flats:
        inside = positions[(positions >= offset) & (positions < offset + flat.numel())] - offset
        parts.append(flat[inside.to(flat.device)].cpu())
        offset += flat.numel()
    return torch.cat(parts)


def _grouped(shards: list[Shard], size: int) -> list[list[Shard]]:
    groups: list[list[Shard]] = [[]]
    filled = 0
    for shard in shards:
        if filled and filled + shard.length > size:
            groups.append([])
            filled = 0
        groups[-1].append(shard)
        filled += shard.length
    return groups
