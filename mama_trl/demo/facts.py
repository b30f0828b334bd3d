"""What the demo's report shows: numbers, curves and samples of a finished run."""

import json
import os
import platform
from pathlib import Path

import torch

from ..disk.writing import write_json
from ..evaluation.size import model_bytes
from ..evaluation.tasks import generate
from ..indicators.history import read_history, take_sample
from ..masks.files import FOLDER, STATE_FILE
from ..masks.maskset import MaskSet
from ..solvers.methods import METHODS
from .page import write_report
from .recipe import BASELINES, STAGES
from .run import Run


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
            chosen = size[mask] if mask.any() else size.new_zeros(1)  # at extreme sparsities no sampled one is kept
            curves[name].append(chosen.mean().item())
            low, high = torch.quantile(chosen, torch.tensor([0.1, 0.9])).tolist()
            curves[f"{name}_p10"].append(low)
            curves[f"{name}_p90"].append(high)
    return {**curves, "stages": stages}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("torch", "transformers", "trl", "accelerate", "datasets", "safetensors", "tokenizers", "mama_trl")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def report_of(run: Run) -> Path:
    facts = {stage: run.finished(stage) for stage in STAGES[:-1]}
    dense, grpo, final, baselines = facts["sft"], facts["grpo"], facts["distill"], facts["baselines"]
    data, tokenizer = run.config.data, run.tokenizer()
    model, teacher = run.load("distill"), run.load("sft")
    masks = MaskSet.load(run.path("distill"))
    prompts = [p for p, _ in run.sums().heldout[:3]] + ["def __init__(self", "import "]
    # A sum's completion ends with its line; the models would go on with the next one.
    samples = [
        [text.split("\n")[0] if prompt.endswith("=") else text for prompt, text in zip(prompts, texts)]
        for texts in (generate(teacher, tokenizer, prompts, 16), generate(model, tokenizer, prompts, 16))
    ]
    measured = ("perplexity", "accuracy")
    calibration_tokens = run.calibration().numel()
    distill_steps = final["steps"]
    report = {
        "title": run.config.title,
        "labels": {name: method.label for name, method in METHODS.items()},
        "versions": _versions(),
        "seed": run.config.seed,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "cuda": run.cuda},
        "corpus": facts["data"]["corpus"],
        "task": facts["data"]["task"],
        "model": {
            "parameters": model.num_parameters(),
            "prunable": sum(row["size"] for row in final["by_matrix"]),
            "config": {"architecture": type(model).__name__, "hidden_size": model.config.hidden_size,
                       "layers": model.config.num_hidden_layers, "vocabulary": model.config.vocab_size},
        },
        "protocol": {
            "sequence_length": data.sequence_length,
            "tokens": run.rows()["heldout"].shape[0] * (data.sequence_length - 1),
            "perplexity": "held-out files joined by a blank line, cut into blocks; positions 1 to the end of each "
            "block are scored",
            "task_prompts": len(run.sums().heldout),
            "task": "greedy completions of prompts whose operand pairs were never seen in training",
            "calibration_tokens": calibration_tokens,
            "calibration": "half text, half task, the same tokens for every method",
        },
        "budgets": {
            "mama": f"{grpo['steps']} GRPO steps with one mask update, then {distill_steps} distillation steps",
            "baselines": f"one-shot pruning of the same dense teacher, then the same {distill_steps} distillation "
            "steps; no GRPO",
        },
        "stages": [
            {"name": f["name"], "seconds": f["seconds"], "steps": f["steps"], "tokens": f["tokens"]}
            for f in facts.values()
        ],
        "sparsity": run.config.sparsity,
        "dense": {**{k: dense[k] for k in measured}, "bytes": model_bytes(run.path("sft"))},
        "pruned": {
            "sparsity": final["sparsity"],
            **{k: final[k] for k in measured},
            "bytes": model_bytes(run.path("distill")),
            "bytes_packed": final["bytes_packed"],
        },
        "baselines": {name: baselines["results"][name] for name in BASELINES},
        "mama_stages": {
            "oneshot": {k: baselines["results"]["mama"]["oneshot"][k] for k in measured},
            "grpo": {k: grpo[k] for k in measured},
            "distilled": {k: final[k] for k in measured},
        },
        "history": {
            "sparsity": grpo["sparsity_history"],
            "reward": grpo["reward"],
            "distill_loss": {"mama": final["loss"], **baselines["loss"]},
        },
        "sparsity_by_matrix": final["by_matrix"],
        "attribution": attribution_histogram(run.path("grpo")),
        "trajectory": trajectory_curves(run.path("distill"), masks),
        "samples": [{"prompt": p, "dense": d, "pruned": s} for p, d, s in zip(prompts, *samples)],
    }
    write_json(run.folder / "report.json", report)
    return write_report(report, run.folder)
