"""One trial of a comparison: prune a model from the same dense weights, measure it, and how means are formed."""

import math
import statistics
import time
from typing import Optional

import torch
from torch import Tensor, nn

from ..evaluation.perplexity import perplexity
from ..pruning.prune import prune


def dense_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights that every trial starts from."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def trial(
    model: nn.Module, dense: dict[str, Tensor], rows: Optional[Tensor], heldout: Tensor, batch_size: int, **options
) -> dict:
    """Prunes `model` (first set back to `dense`) with `prune(**options)` and measures it on `heldout`.

    Returns `nats` and `perplexity` per held-out token, `reached` (pruned share), `seconds` (of pruning alone, by the
    clock) and `cpu_seconds` (the same as this process was given processor time, whatever else ran beside it).
    """
    with torch.no_grad():
        model.load_state_dict(dense)
    started, given = time.perf_counter(), time.process_time()
    masks = prune(model, rows, batch_size=batch_size, progress=False, **options)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - given
    measured = perplexity(model, heldout, batch_size)
    return {
        "nats": measured["nats"], "perplexity": measured["perplexity"], "reached": masks.sparsity(), "seconds": seconds,
        "cpu_seconds": cpu_seconds,
    }


def summarise(trials: list[dict], keys: tuple[str, ...], dense_nats: float, vocabulary: int) -> list[dict]:
    """One row per distinct `keys`, in the order of their first trial.

    Each row has `nats`, the mean over the trials (seeds), `deviation`, its sample standard deviation, `perplexity`, the
    exponential of that mean, and `excess`, the mean of min(nats, log vocabulary) − dense: beyond a uniform guess a
    model is simply broken, so no method gains or loses by how badly.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in trials:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    result = []
    for values, members in groups.items():
        nats = [member["nats"] for member in members]
        mean = statistics.mean(nats)
        result.append({
            **dict(zip(keys, values)),
            "nats": mean,
            "deviation": statistics.stdev(nats) if len(nats) > 1 else 0.0,
            "perplexity": math.exp(min(mean, 700.0)),
            "excess": statistics.mean(min(value, math.log(vocabulary)) for value in nats) - dense_nats,
            "reached": statistics.mean(member["reached"] for member in members),
            "seconds": statistics.mean(member["seconds"] for member in members),
            "cpu_seconds": statistics.mean(member["cpu_seconds"] for member in members),
            "seeds": len(members),
        })
    return result
