"""One-shot pruning on two trained checkpoints that nobody here trained: MAMA against its baselines.

    python benchmarks/oneshot.py --output oneshot.json            # everything: 7 levels, 3 seeds, 2:4; half an hour
    python benchmarks/oneshot.py --output quick.json --quick      # the same code on less of it; under 3 minutes
    python benchmarks/oneshot.py --show oneshot.json --plot p.png # tables in Markdown and a plot of what was measured

Protocol: the column `text` joined by blank lines, tokenised without special tokens, blocks of 256; calibration on 128
blocks of train.jsonl drawn with each seed, evaluation on the first 128 blocks of valid.jsonl, positions 1-255 scored.
Excess is min(nats, log vocabulary) - dense nats. The summary holds

- `excess_vs_sparsegpt`, `excess_vs_alps`: MAMA's excess over theirs, each averaged over levels and models;
- `worst_margin`: the largest of MAMA's excess minus the best baseline's, over levels and models;
- `time_vs_sparsegpt`: MAMA's wall seconds over SparseGPT's, mean over all trials, the pass that estimates MAMA's
  budget included; `cpu_time_vs_sparsegpt` the same in processor time, which other work on the machine does not change;
- `peak_memory_ratio`: bytes of live tensors at MAMA's peak, with 64 calibration blocks taken one at a time, over
  model + 3 x its largest block + the hidden states of all calibration tokens in two streams (dense and pruned), the
  larger of the two models; `peak_memory_sparsegpt` is SparseGPT's over the same bound, `peak_memory_budget` that of
  the budget pass, `peak_memory_one_stream` MAMA's over the bound with one stream instead of two.

Trials of the methods are interleaved; every one runs on one thread unless OMP_NUM_THREADS says otherwise. The file is
written anew after each seed, memory comes last.
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
from mama_trl.compare.trial import dense_state, summarise, trial
from mama_trl.evaluation.loading import load_model, load_tokenizer
from mama_trl.evaluation.perplexity import perplexity
from mama_trl.evaluation.text import blocks, read_text
from mama_trl.model.blocks import find_blocks
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import predicted_losses, prune
from mama_trl.report.plots import METHOD_COLOURS, STYLE, number, plt
from mama_trl.solvers.methods import METHODS

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


def peak_bytes(model, dense, rows, method: str) -> int:
    """Of pruning by `method` with a uniform budget, or of the `budget` pass alone."""
    with torch.no_grad():
        model.load_state_dict(dense)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    with PeakBytes(weights + rows.numel() * rows.element_size()) as meter:
        if method == "budget":
            predicted_losses(model, rows[::4].repeat(8, 1), find_targets(model), batch_size=1)  # reads an eighth
        else:
            prune(model, rows, method, sparsity=0.7, batch_size=1, progress=False, budget="uniform")
    return meter.peak


def memory_bound(model, rows, streams: int = 2) -> int:
    """Model + 3 x its largest block + `streams` of hidden states over the calibration tokens, bytes."""
    def size(module):
        return sum(p.numel() * p.element_size() for p in module.parameters())

    element = next(model.parameters()).element_size()
    hidden = model.config.get_text_config().hidden_size
    largest = max(size(block) for _, block in find_blocks(model))
    return size(model) + 3 * largest + streams * rows.numel() * hidden * element


class Checkpoint:
    """A model with its text and the trials made on it so far, by pattern."""

    def __init__(self, name: str, calibration_blocks: int, evaluation_blocks: int):
        self.name, self._size = name, calibration_blocks
        folder = str(DATA / "models" / name)
        self._tokenizer, self._model = load_tokenizer(folder), load_model(folder)
        self._train, valid = (read_text(DATA / "tinystories" / f"{part}.jsonl") for part in ("train", "valid"))
        self._heldout = blocks(self._tokenizer, valid, LENGTH, limit=evaluation_blocks)
        self._dense = dense_state(self._model)
        self._reference = perplexity(self._model, self._heldout)
        self._trials: dict[str, list[dict]] = {}
        self._memory: dict[str, int] = {}

    def calibration(self, seed: int):
        return blocks(self._tokenizer, self._train, LENGTH, limit=self._size, seed=seed)

    def run(self, levels, seed: int, first: bool, pattern: str) -> None:
        """One trial of each method at each level; magnitude, which needs no calibration, for the `first` seed only."""
        trials = self._trials.setdefault(pattern, [])
        rows = self.calibration(seed)
        for level in levels:
            for method in METHODS if first else [name for name in METHODS if name != "magnitude"]:
                found = trial(
                    self._model, self._dense, rows, self._heldout, 8, method=method, sparsity=level, pattern=pattern
                )
                trials.append({"method": method, "sparsity": level, "seed": seed, **found})
                print(
                    f"{self.name:<16} {pattern} {level:g} seed {seed} {method:<9} {found['nats']:8.4f} nats "
                    f"{found['seconds']:6.1f} s", flush=True,
                )

    def measure_memory(self) -> None:
        rows = self.calibration(0)[:64]  # the meter slows every operation down
        self._memory = {m: peak_bytes(self._model, self._dense, rows, m) for m in ("sparsegpt", "mama", "budget")}
        self._memory["bound"] = memory_bound(self._model, rows)
        self._memory["bound_one_stream"] = memory_bound(self._model, rows, streams=1)

    def results(self) -> list[dict]:
        vocabulary = self._model.config.get_text_config().vocab_size
        nats = self._reference["nats"]
        return [
            {
                "model": self.name, "pattern": pattern, "vocabulary": vocabulary, "dense_nats": nats,
                "dense": self._reference["perplexity"], "tokens": self._reference["tokens"], "memory": self._memory,
                "rows": summarise(trials, ("method", "sparsity"), nats, vocabulary), "trials": trials,
            }
            for pattern, trials in self._trials.items()
        ]


def summary(results: list[dict]) -> dict:
    """The marks over all unstructured results; see the module's docstring."""
    excess: dict[str, list[float]] = {method: [] for method in METHODS}
    margins = []
    seconds: dict[str, dict[str, list]] = {key: {m: [] for m in METHODS} for key in ("seconds", "cpu_seconds")}
    for result in results:
        found = {(row["method"], row["sparsity"]): row["excess"] for row in result["rows"]}
        for level in sorted({row["sparsity"] for row in result["rows"]}):
            for method in METHODS:
                excess[method].append(found[method, level])
            best = min(found[method, level] for method in METHODS if method != "mama")
            margins.append((found["mama", level] - best, result["model"], level))
        for key, by_method in seconds.items():
            for row in result["trials"]:
                by_method[row["method"]].append(row[key])
    means = {method: sum(values) / len(values) for method, values in excess.items()}
    times = {key: {m: sum(v) / len(v) for m, v in by_method.items()} for key, by_method in seconds.items()}
    memory = [result["memory"] for result in results if result["memory"]]
    return {
        "excess_vs_sparsegpt": means["mama"] / means["sparsegpt"],
        "excess_vs_alps": means["mama"] / means["alps"],
        "worst_margin": max(margins)[0],
        "time_vs_sparsegpt": times["seconds"]["mama"] / times["seconds"]["sparsegpt"],
        "cpu_time_vs_sparsegpt": times["cpu_seconds"]["mama"] / times["cpu_seconds"]["sparsegpt"],
        "peak_memory_ratio": max((m["mama"] / m["bound"] for m in memory), default=None),
        "peak_memory_sparsegpt": max((m["sparsegpt"] / m["bound"] for m in memory), default=None),
        "peak_memory_budget": max((m["budget"] / m["bound"] for m in memory), default=None),
        "peak_memory_one_stream": max((m["mama"] / m["bound_one_stream"] for m in memory), default=None),
        **{f"mean_excess_{method}": value for method, value in means.items()},
        **{f"mean_{key}_{method}": value for key, by_method in times.items() for method, value in by_method.items()},
    }


def machine() -> dict:
    return {
        "processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "mama_trl": mama_trl.__version__,
    }


def write(args, checkpoints: list[Checkpoint], levels, seeds, size: int, seconds: float) -> dict:
    results = [result for checkpoint in checkpoints for result in checkpoint.results()]
    free = [result for result in results if result["pattern"] == "unstructured"]
    grouped = [result for result in results if result["pattern"] == "2:4"]
    found = {
        "command": f"python benchmarks/oneshot.py --output {args.output.name}" + (" --quick" if args.quick else ""),
        "protocol": {
            "text": "tinystories/valid.jsonl", "calibration": "tinystories/train.jsonl", "sequence_length": LENGTH,
            "calibration_blocks": size, "evaluation_blocks": size, "levels": levels, "seeds": seeds, "batch_size": 8,
        },
        "machine": machine(),
        "wall_seconds": seconds,
        "summary": summary(free),
        "summary_2_4": summary(grouped) if grouped else None,
        "results": results,
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def show(found: dict) -> None:
    """Prints the tables in Markdown: perplexity (exponential of the mean over seeds), its deviation, and excess."""
    for result in found["results"]:
        rows = {(row["method"], row["sparsity"]): row for row in result["rows"]}
        levels = sorted({row["sparsity"] for row in result["rows"]})
        print(f"\n{result['model']}, {result['pattern']}, dense {result['dense']:.3f}\n")
        print("| | " + " | ".join(f"{level:g}" for level in levels) + " | mean excess |")
        print("|---|" + "---:|" * (len(levels) + 1))
        for method in METHODS:
            own = [rows[method, level] for level in levels]
            cells = [f"{number(row['perplexity'])} ± {100 * row['deviation']:.1f} %" for row in own]
            mean = sum(row["excess"] for row in own) / len(own)
            print(f"| {METHODS[method].label} | " + " | ".join(cells) + f" | {mean:.3f} |")
    marks = {"summary": found["summary"], "summary_2_4": found["summary_2_4"]}
    print("\n```\n" + json.dumps(marks, indent=1) + "\n```")


def plot(found: dict, path: Path) -> None:
    """Perplexity by sparsity on a log axis, one picture per model, with the dense model and a uniform guess."""
    results = [result for result in found["results"] if result["pattern"] == "unstructured"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 4))
        for axis, result in zip(axes, results):
            for method in METHODS:
                rows = sorted((row["sparsity"], row["perplexity"]) for row in result["rows"] if row["method"] == method)
                # Beyond a uniform guess a model is broken, and by how much says nothing.
                values = [min(value, 4 * result["vocabulary"]) for _, value in rows]
                axis.plot(
                    range(len(rows)), values, marker="o", markersize=4, color=METHOD_COLOURS[method],
                    label=METHODS[method].label,
                )
            axis.set_xticks(range(len(rows)), [f"{level:g}" for level, _ in rows])
            axis.axhline(result["dense"], color="black", linestyle="--", linewidth=1, label="dense")
            axis.axhline(result["vocabulary"], color="black", linestyle=":", linewidth=1, label="uniform guess")
            axis.set(
                xlabel="sparsity", ylabel="perplexity", yscale="log", title=result["model"],
                ylim=(result["dense"] * 0.8, 3 * result["vocabulary"]),
            )
        names = axes[0].get_legend_handles_labels()
        figure.legend(*names, fontsize=8, ncol=len(names[0]), loc="upper center", bbox_to_anchor=(0.5, 0.0))
        figure.savefig(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON to write")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print an earlier run's tables, measuring nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="with --show: PNG to write")
    parser.add_argument("--quick", action="store_true", help="2 levels, 1 seed, 64 blocks: under 3 minutes")
    args = parser.parse_args()
    if args.show:
        found = json.loads(args.show.read_text(encoding="utf-8"))
        show(found)
        if args.plot:
            plot(found, args.plot)
        return 0
    if args.output is None:
        parser.error("--output is missing")
    if not DATA.is_dir():
        print("the data folder ../shared/data is not there: this benchmark cannot run", file=sys.stderr)
        return 2
    levels, seeds, size = ((0.5, 0.9), (0,), 64) if args.quick else (LEVELS, (0, 1, 2), 128)
    started = time.time()
    checkpoints = [Checkpoint(name, size, size) for name in MODELS]
    for done, seed in enumerate(seeds, 1):
        for checkpoint in checkpoints:
            checkpoint.run(levels, seed, done == 1, "unstructured")
            if not args.quick:
                checkpoint.run((0.5,), seed, done == 1, "2:4")
        found = write(args, checkpoints, levels, seeds[:done], size, time.time() - started)
    for checkpoint in checkpoints:
        checkpoint.measure_memory()
    found = write(args, checkpoints, levels, seeds, size, time.time() - started)
    print(json.dumps({"summary": found["summary"], "summary_2_4": found["summary_2_4"]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
