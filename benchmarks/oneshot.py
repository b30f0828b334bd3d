"""One-shot pruning on two trained checkpoints that nobody here trained: MAMA against its baselines.

    python benchmarks/oneshot.py --output oneshot.json            # everything: 7 levels, 3 seeds, 2:4; half an hour
    python benchmarks/oneshot.py --output quick.json --quick      # the same code on less of it; under 3 minutes

Protocol: the column `text` joined by blank lines, tokenised without special tokens, blocks of 256; calibration on 128
blocks of train.jsonl drawn with each seed, evaluation on the first 128 blocks of valid.jsonl, positions 1-255 scored.
Excess is min(nats, log vocabulary) - dense nats. The summary holds

- `excess_vs_sparsegpt`, `excess_vs_alps`: MAMA's excess over theirs, each averaged over levels and models;
- `worst_margin`: the largest of MAMA's excess minus the best baseline's, over levels and models;
- `time_vs_sparsegpt`: MAMA's seconds over SparseGPT's, summed over all trials of both, and each one's mean;
- `peak_memory_ratio`: bytes of live tensors at MAMA's peak, over model + 3 x its largest block + the hidden states of
  all calibration tokens in two streams (dense and pruned), the larger of the two models; `peak_memory_sparsegpt` is
  SparseGPT's peak over the same bound.

Every trial runs on one thread unless OMP_NUM_THREADS says otherwise; wall times are of pruning alone, with nothing
else of this program running.
"""

import argparse
import json
import os
import platform
import sys
import time
import weakref
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mama_trl
from mama_trl.evaluation import blocks, perplexity, read_text
from mama_trl.oneshot import METHODS, prune
from mama_trl.oneshot.compare import dense_state, summarise, trial
from mama_trl.scripts.common import load_model, load_tokenizer
from mama_trl.targets import find_blocks

DATA = Path(__file__).resolve().parents[1] / ".." / "shared" / "data"
MODELS = ("stories260K", "babyllama-tok105")
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
LENGTH = 256


class PeakBytes(TorchDispatchMode):
    """Most bytes of tensor storage alive at once among those made while it is active, `before` included."""

    def __init__(self, before: int):
        super().__init__()
        self.live = self.peak = before
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor):
                self._note(value.untyped_storage(), made=any(value is leaf for leaf in tree_leaves(out)))
        return out

    def _note(self, storage, made: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if made else 0  # what was there before the start is counted already
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(model, dense, rows, method: str, batch_size: int) -> int:
    with torch.no_grad():
        model.load_state_dict(dense)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with PeakBytes(weights + rows.numel() * rows.element_size()) as meter:
        prune(model, rows, method, 0.7, batch_size=batch_size, progress=False)
    return meter.peak


def memory_bound(model, rows) -> int:
    """Model + 3 x its largest block + two streams of hidden states over the calibration tokens, bytes."""
    def size(module):
        return sum(p.numel() * p.element_size() for p in module.parameters())

    element = next(model.parameters()).element_size()
    hidden = model.config.get_text_config().hidden_size
    largest = max(size(block) for _, block in find_blocks(model))
    return size(model) + 3 * largest + 2 * rows.numel() * hidden * element


def measure(name: str, levels, seeds, calibration_blocks: int, evaluation_blocks: int, pattern: str, log) -> dict:
    folder = DATA / "models" / name
    tokenizer, model = load_tokenizer(str(folder)), load_model(str(folder))
    train, valid = (read_text(DATA / "tinystories" / f"{part}.jsonl") for part in ("train", "valid"))
    heldout = blocks(tokenizer, valid, LENGTH, limit=evaluation_blocks)
    calibration = {s: blocks(tokenizer, train, LENGTH, limit=calibration_blocks, seed=s) for s in seeds}
    dense = dense_state(model)
    reference = perplexity(model, heldout)
    vocabulary = model.config.get_text_config().vocab_size
    trials = []
    for level in levels:
        for seed in seeds:
            for method in METHODS:
                if method == "magnitude" and seed != seeds[0]:
                    continue  # needs no calibration: every seed gives the same
                found = trial(
                    model, dense, calibration[seed], heldout, 8, method=method, sparsity=level, pattern=pattern
                )
                trials.append({"method": method, "sparsity": level, "seed": seed, **found})
                log(f"{name} {pattern} {level:g} seed {seed} {method:<9} {found['nats']:.4f} {found['seconds']:.1f} s")
    rows = summarise(trials, ("method", "sparsity"), reference["nats"], vocabulary)
    result = {
        "model": name, "pattern": pattern, "vocabulary": vocabulary, "dense_nats": reference["nats"],
        "dense": reference["perplexity"], "tokens": reference["tokens"], "rows": rows, "trials": trials,
    }
    if pattern == "unstructured":
        some = calibration[seeds[0]]
        bound = memory_bound(model, some)
        result["memory"] = {"bound": bound, **{m: peak_bytes(model, dense, some, m, 8) for m in ("sparsegpt", "mama")}}
    return result


def summary(results: list[dict]) -> dict:
    """The marks over all unstructured results; see the module's docstring."""
    excess: dict[str, list[float]] = {method: [] for method in METHODS}
    margins, seconds = [], {"sparsegpt": [], "mama": []}
    for result in results:
        found = {(row["method"], row["sparsity"]): row["excess"] for row in result["rows"]}
        for level in sorted({row["sparsity"] for row in result["rows"]}):
            for method in METHODS:
                excess[method].append(found[method, level])
            best = min(found[method, level] for method in METHODS if method != "mama")
            margins.append((found["mama", level] - best, result["model"], level))
        for method in seconds:
            seconds[method] += [row["seconds"] for row in result["trials"] if row["method"] == method]
    means = {method: sum(values) / len(values) for method, values in excess.items()}
    times = {method: sum(values) / len(values) for method, values in seconds.items()}
    memory = [result["memory"] for result in results if "memory" in result]
    return {
        "excess_vs_sparsegpt": means["mama"] / means["sparsegpt"],
        "excess_vs_alps": means["mama"] / means["alps"],
        "worst_margin": max(margins)[0],
        "worst_margin_at": list(max(margins)[1:]),
        "time_vs_sparsegpt": times["mama"] / times["sparsegpt"],
        "peak_memory_ratio": max((m["mama"] / m["bound"] for m in memory), default=None),
        "peak_memory_sparsegpt": max((m["sparsegpt"] / m["bound"] for m in memory), default=None),
        "mean_excess": means,
        "mean_seconds": times,
    }


def machine() -> dict:
    return {
        "processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "mama_trl": mama_trl.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON to write")
    parser.add_argument("--quick", action="store_true", help="2 levels, 1 seed, 64 blocks: under 3 minutes")
    args = parser.parse_args()
    if not DATA.is_dir():
        print("the data folder ../shared/data is not there: this benchmark cannot run", file=sys.stderr)
        return 2
    levels, seeds, size = ((0.5, 0.9), (0,), 64) if args.quick else (LEVELS, (0, 1, 2), 128)
    started = time.time()

    def log(line: str) -> None:
        print(line, flush=True)

    results = [measure(name, levels, seeds, size, size, "unstructured", log) for name in MODELS]
    grouped = [] if args.quick else [measure(name, (0.5,), seeds, size, size, "2:4", log) for name in MODELS]
    found = {
        "command": f"python benchmarks/oneshot.py --output {args.output.name}" + (" --quick" if args.quick else ""),
        "protocol": {
            "text": "tinystories/valid.jsonl", "calibration": "tinystories/train.jsonl", "sequence_length": LENGTH,
            "calibration_blocks": size, "evaluation_blocks": size, "levels": levels, "seeds": seeds, "batch_size": 8,
        },
        "machine": machine(),
        "wall_seconds": time.time() - started,
        "summary": summary(results),
        "summary_2_4": summary(grouped) if grouped else None,
        "results": results + grouped,
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({"summary": found["summary"], "summary_2_4": found["summary_2_4"]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
