"""What the report draws, taken from the statistics and masks that a run left behind. The one part of the
report that reads tensors."""

import json
from pathlib import Path

import torch

from ..callback import STATE_FILE
from ..masks import FOLDER, MaskSet
from ..trajectory import read_history, take_sample


def attribution_histogram(folder: str | Path) -> dict | None:
    """What the last mask update saw: the reward attribution of kept and pruned connections, as bin counts."""
    return json.loads((Path(folder) / FOLDER / STATE_FILE).read_text(encoding="utf-8")).get("attribution")


def trajectory_curves(folder: str | Path, masks: MaskSet) -> dict:
    """Mean, 10th and 90th percentile of |w| over all stages, apart for what was kept and pruned in the end."""
    history = read_history(folder)
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
