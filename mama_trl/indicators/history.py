"""What the report shows of a trajectory: the values of a sample of connections over time, and a histogram."""

from pathlib import Path

import torch
from torch import Tensor

from ..engines import ranks
from ..masks.files import RangeReader
from ..masks.maskset import MaskSet
from .trajectory import STEM, Trajectory

SAMPLES = 2048  # connections whose values are written down for the report's trajectory plot


@torch.no_grad()
def sample(trajectory: Trajectory, step: int, stage: str, names: list[str]) -> None:
    """Writes down the values of a fixed random sample of connections of these parameters. Collective."""
    shards = {shard.name: shard for shard in trajectory.shards}
    chosen = [shards[name] for name in names]
    values = sample_owned([s.numel for s in chosen], [(s.start, s.master) for s in chosen])
    trajectory.history.append({"step": step, "stage": stage, "values": ranks.total(values, trajectory.group).tolist()})


def histogram(trajectory: Trajectory, name: str, masks: MaskSet, bins: int = 48) -> dict:
    """Bin counts of log10 of an indicator, relative to its mean, apart for kept and pruned connections.

    Taken at a mask update, since a pruned connection's attribution is zero ever after. Collective.
    """
    values = {key: value for key, value in trajectory.importance(name).items() if key in masks.names}
    sums = torch.stack([value.double().sum() for value in values.values()]).sum()
    size = sum(torch.Size(masks.shapes[key]).numel() for key in values)
    mean = (ranks.total(sums, trajectory.group) / size).clamp_min(1e-38).float()
    edges = torch.linspace(-3, 2, bins + 1)
    counts = {"kept": torch.zeros(bins), "pruned": torch.zeros(bins)}
    for key, value in values.items():
        logs = (value / mean).clamp_min(1e-6).log10().clamp(-3, 2).cpu()
        mask = masks.mask(key).cpu()
        counts["kept"] += torch.histogram(logs[mask], edges).hist
        counts["pruned"] += torch.histogram(logs[~mask], edges).hist
    whole = {key: ranks.total(value.to(mean.device), trajectory.group) for key, value in counts.items()}
    return {"edges_log10": edges.tolist(), **{key: value.long().tolist() for key, value in whole.items()}}


def read_history(folder: str | Path) -> list[dict]:
    """The sampled values that a run wrote down: dictionaries with `step`, `stage` and `values`."""
    reader = RangeReader.find(folder, STEM)
    return reader.header["history"] if reader is not None else []


def sample_owned(sizes: list[int], parts: list[tuple[int, Tensor]], seed: int = 0) -> Tensor:
    """The same `SAMPLES` random positions of the concatenation of 1-D tensors, fp32; 0 where this rank owns nothing.

    Args:
        sizes: elements of each whole tensor.
        parts: (start, owned values) of each.
    """
    total = sum(sizes)
    positions = torch.randint(total, (min(SAMPLES, total),), generator=torch.Generator().manual_seed(seed))
    positions = positions.sort().values
    result = torch.zeros(len(positions), device=parts[0][1].device)
    offset = 0
    for size, (start, values) in zip(sizes, parts):
        inside = (positions >= offset + start) & (positions < offset + start + values.numel())
        where = inside.nonzero().squeeze(1).to(result.device)
        result[where] = values[(positions[inside] - offset - start).to(values.device)].float().to(result.device)
        offset += size
    return result


def take_sample(flats: list[Tensor], seed: int = 0) -> Tensor:
    """The same `SAMPLES` random positions of the concatenation of whole 1-D tensors, on the CPU, in their dtype."""
    sample = sample_owned([flat.numel() for flat in flats], [(0, flat) for flat in flats], seed)
    return sample.cpu().to(flats[0].dtype)
