"""What the report draws, taken from the statistics and masks that a run left behind. The one part of the
report that reads tensors."""

import json
from pathlib import Path

import torch
from safetensors import safe_open

from ..masks import FOLDER, MaskSet
from ..trajectory import FILE, take_sample


def attribution_histogram(folder: str | Path, masks: MaskSet, bins: int = 48) -> dict:
    """Counts of log10 of the reward attribution, apart for kept and pruned connections.

    The attribution is divided by its mean over all connections first, so 0 is an average connection.
    """
    with safe_open(Path(folder) / FOLDER / FILE, "pt") as file:
        values = {name: file.get_tensor(f"reward/{name}").float().sqrt() for name in masks.names}
    mean = sum(v.sum() for v in values.values()) / sum(v.numel() for v in values.values())
    logs = {name: (value / mean).clamp_min(1e-6).log10() for name, value in values.items()}
    kept = torch.cat([logs[name][masks.mask(name)] for name in masks.names])
    pruned = torch.cat([logs[name][~masks.mask(name)] for name in masks.names])
    edges = torch.linspace(-3, 2, bins + 1)
    count = lambda x: torch.histogram(x.clamp(-3, 2), edges).hist.long().tolist()  # noqa: E731
    return {"edges_log10": edges.tolist(), "kept": count(kept), "pruned": count(pruned)}


def trajectory_curves(folder: str | Path, masks: MaskSet) -> dict:
    """Mean, 10th and 90th percentile of |w| over all stages, apart for what was kept and pruned in the end."""
    with safe_open(Path(folder) / FOLDER / FILE, "pt") as file:
        history = json.loads(file.metadata()["history"])
    kept = take_sample([masks.mask(name).reshape(-1) for name in masks.names])
    curves = {key: [] for key in ("steps", "kept", "pruned", "kept_p10", "kept_p90", "pruned_p10", "pruned_p90")}
    stages, offset, last = [], 0, 0
    for record in history:
        if not stages or stages[-1][0] != record["stage"]:
            offset += last
            stages.append([record["stage"], offset])
        last = record["step"]
        size = torch.tensor(record["values"]).abs()
        curves["steps"].append(offset + record["step"])
        for name, mask in (("kept", kept), ("pruned", ~kept)):
            chosen = size[mask]
            curves[name].append(chosen.mean().item())
            low, high = torch.quantile(chosen, torch.tensor([0.1, 0.9])).tolist()
            curves[f"{name}_p10"].append(low)
            curves[f"{name}_p90"].append(high)
    return {**curves, "stages": stages}
