"""One-shot pruning on trained checkpoints: MAMA against its baselines and against controls.

    python -m benchmarks.oneshot --output oneshot.json            # 7 levels, 3 seeds, 2:4; hours, a stopped run goes on
    python -m benchmarks.oneshot --output quick.json --quick      # the same code on less of it; under 3 minutes
    python -m benchmarks.oneshot --output kinds.json --model runs/models/gemma3 [...] --levels 0.5,0.7,0.9 --seeds 0
    python -m benchmarks.oneshot --show oneshot.json --plot p.png # tables in Markdown and a plot of what was measured

Without `--model`: two checkpoints that nobody here trained. benchmarks/small_models.py makes those of other kinds.

Protocol: the column `text` joined by blank lines, tokenised without special tokens, blocks of 256; calibration on 128
blocks of train.jsonl drawn with each seed, evaluation on the first 128 blocks of valid.jsonl, positions 1-255 scored.
Excess is min(nats, log vocabulary) - dense nats. Each trial is appended to OUTPUT.cells and not measured again. The
controls, which are not of the product, are ALPS with MAMA's budget and a composite of public ideas (composite.py).
Ratios below are of means over levels and models, over the seeds that both have. The summary holds

- `excess_vs_sparsegpt`, `excess_vs_alps`, `excess_vs_alps_same_budget`, `excess_vs_composite`: MAMA's excess over
  theirs; `excess_vs_sparsegpt_refined` that of MAMA with `--refine`;
- `worst_margin`: the largest of MAMA's excess minus the best baseline's, over levels and models;
- `time_vs_sparsegpt`, `time_vs_alps`: MAMA's processor seconds over theirs, the pass that estimates MAMA's budget
  included; `wall_vs_sparsegpt` the same by the clock, which other work on the machine changes;
- `peak_memory_ratio`: bytes of live tensors at MAMA's peak, with 64 calibration blocks taken one at a time, over
  model + 3 x its largest block + the hidden states of all calibration tokens in two streams (dense and pruned), the
  larger of the two models; `peak_memory_sparsegpt` is SparseGPT's over the same bound, `peak_memory_budget` that of
  the budget pass, `peak_memory_one_stream` MAMA's over the bound with one stream instead of two.

Trials of the methods are interleaved; every one runs on one thread unless OMP_NUM_THREADS says otherwise.
"""

import argparse
import json
import math
import os
import sys
import weakref
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import machine
from benchmarks.ways import WAYS
from mama_trl.compare.trial import dense_state, summarise, trial
from mama_trl.evaluation.loading import load_model, load_tokenizer
from mama_trl.evaluation.perplexity import perplexity
from mama_trl.evaluation.text import blocks, read_text
from mama_trl.model.blocks import find_blocks
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import predicted_losses, prune
from mama_trl.report.plots import STYLE, number, plt
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
    """A model with its text, and the trials made on it so far, which lie in `store`."""

    def __init__(self, folder: Path, size: int, store: Path, seeds: list[int]):
        self.name, self._size, self._store = folder.name, size, store
        self._tokenizer, self._model = load_tokenizer(str(folder)), load_model(str(folder))
        self._train, valid = (read_text(DATA / "tinystories" / f"{part}.jsonl") for part in ("train", "valid"))
        self._heldout = blocks(self._tokenizer, valid, LENGTH, limit=size)
        self._dense = dense_state(self._model)
        self._reference = perplexity(self._model, self._heldout)
        rows = map(json.loads, store.read_text().splitlines()) if store.is_file() else []
        self._trials = [
            row for row in rows if row["model"] == self.name and row["blocks"] == size and row["seed"] in {0, *seeds}
        ]
        self._memory: dict[str, int] = {}

    def calibration(self, seed: int):
        return blocks(self._tokenizer, self._train, LENGTH, limit=self._size, seed=seed)

    def run(self, levels: list[float], seed: int, pattern: str, ways: list[str]) -> None:
        """One trial of each way at each level; magnitude, which needs no calibration, for one seed only."""
        known = {(row["way"], row["sparsity"], row["seed"], row["pattern"]) for row in self._trials}
        rows = self.calibration(seed)
        for level in levels:
            for way in ways:
                own = 0 if way == "magnitude" else seed
                if (way, level, own, pattern) in known or (pattern != "unstructured" and way == "alps_budget"):
                    continue
                found = trial(
                    self._model, self._dense, rows, self._heldout, 8, sparsity=level, pattern=pattern,
                    **WAYS[way].options,
                )
                row = {
                    "model": self.name, "blocks": self._size, "way": way, "sparsity": level, "seed": own,
                    "pattern": pattern, **found,
                }
                self._trials.append(row)
                known.add((way, level, own, pattern))
                with open(self._store, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{self.name:<16} {pattern} {level:g} seed {seed} {way:<12} {found['nats']:8.4f} nats "
                    f"{found['cpu_seconds']:6.1f} s", flush=True,
                )

    def measure_memory(self) -> None:
        rows = self.calibration(0)[:64]  # the meter slows every operation down
        self._memory = {m: peak_bytes(self._model, self._dense, rows, m) for m in ("sparsegpt", "mama", "budget")}
        self._memory["bound"] = memory_bound(self._model, rows)
        self._memory["bound_one_stream"] = memory_bound(self._model, rows, streams=1)

    def results(self) -> list[dict]:
        vocabulary = self._model.config.get_text_config().vocab_size
        nats = self._reference["nats"]
        found = []
        for pattern in sorted({row["pattern"] for row in self._trials}, reverse=True):
            trials = [row for row in self._trials if row["pattern"] == pattern]
            found.append({
                "model": self.name, "pattern": pattern, "vocabulary": vocabulary, "dense_nats": nats,
                "dense": self._reference["perplexity"], "tokens": self._reference["tokens"], "memory": self._memory,
                "rows": summarise(trials, ("way", "sparsity"), nats, vocabulary), "trials": trials,
            })
        return found


def ratio(results: list[dict], one: str, other: str, value: str) -> float | None:
    """Of the means of `value` (`excess`, `seconds`, `cpu_seconds`) over what was measured in both ways."""
    sums = [0.0, 0.0]
    for result in results:
        cells = {(row["way"], row["sparsity"], row["seed"]): row for row in result["trials"]}
        cap, dense = math.log(result["vocabulary"]), result["dense_nats"]
        for (way, level, seed), row in cells.items():
            pair = (row, cells.get((other, level, seed)))
            if way == one and pair[1] is not None:
                for place, each in enumerate(pair):
                    sums[place] += min(each["nats"], cap) - dense if value == "excess" else each[value]
    return sums[0] / sums[1] if sums[1] else None


def summary(results: list[dict]) -> dict:
    """The marks over all results given; see the module's docstring. What was not measured is left out."""
    margins = []
    for result in results:
        found = {(row["way"], row["sparsity"]): row["excess"] for row in result["rows"]}
        for way, level in found:
            rivals = [found[name, level] for name in METHODS if name != "mama" and (name, level) in found]
            if way == "mama" and rivals:
                margins.append(found["mama", level] - min(rivals))
    memory = [result["memory"] for result in results if result["memory"]]
    marks = {
        "excess_vs_sparsegpt": ratio(results, "mama", "sparsegpt", "excess"),
        "excess_vs_alps": ratio(results, "mama", "alps", "excess"),
        "excess_vs_alps_same_budget": ratio(results, "mama", "alps_budget", "excess"),
        "excess_vs_composite": ratio(results, "mama", "composite", "excess"),
        "excess_vs_sparsegpt_refined": ratio(results, "mama_refined", "sparsegpt", "excess"),
        "worst_margin": max(margins, default=None),
        "time_vs_sparsegpt": ratio(results, "mama", "sparsegpt", "cpu_seconds"),
        "time_vs_alps": ratio(results, "mama", "alps", "cpu_seconds"),
        "time_vs_sparsegpt_refined": ratio(results, "mama_refined", "sparsegpt", "cpu_seconds"),
        "wall_vs_sparsegpt": ratio(results, "mama", "sparsegpt", "seconds"),
        "peak_memory_ratio": max((m["mama"] / m["bound"] for m in memory), default=None),
        "peak_memory_sparsegpt": max((m["sparsegpt"] / m["bound"] for m in memory), default=None),
        "peak_memory_budget": max((m["budget"] / m["bound"] for m in memory), default=None),
        "peak_memory_one_stream": max((m["mama"] / m["bound_one_stream"] for m in memory), default=None),
    }
    return {name: value for name, value in marks.items() if value is not None}


def write(args, checkpoints: list[Checkpoint], size: int) -> dict:
    results = [result for checkpoint in checkpoints for result in checkpoint.results()]
    found = {
        "command": " ".join(["python -m benchmarks.oneshot", *sys.argv[1:]]),
        "protocol": {
            "text": "tinystories/valid.jsonl", "calibration": "tinystories/train.jsonl", "sequence_length": LENGTH,
            "calibration_blocks": size, "evaluation_blocks": size, "batch_size": 8,
        },
        "machine": machine(),
        "summary": summary([result for result in results if result["pattern"] == "unstructured"]),
        "summary_by_model": {r["model"]: summary([r]) for r in results if r["pattern"] == "unstructured"},
        "summary_2_4": summary([result for result in results if result["pattern"] == "2:4"]),
        "results": results,
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def show(found: dict) -> None:
    """Prints the tables in Markdown: perplexity (exponential of the mean over seeds), its deviation, and excess."""
    for result in found["results"]:
        rows = {(row["way"], row["sparsity"]): row for row in result["rows"]}
        levels = sorted({row["sparsity"] for row in result["rows"]})
        print(f"\n{result['model']}, {result['pattern']}, dense {result['dense']:.3f}\n")
        print("| | " + " | ".join(f"{level:g}" for level in levels) + " | mean excess | seconds | seeds |")
        print("|---|" + "---:|" * (len(levels) + 3))
        for name, way in WAYS.items():
            own = [rows.get((name, level)) for level in levels]
            if all(own):
                cells = [f"{number(row['perplexity'])} ± {100 * row['deviation']:.1f} %" for row in own]
                excess, seconds = (sum(row[key] for row in own) / len(own) for key in ("excess", "cpu_seconds"))
                cells += [f"{excess:.3f}", f"{seconds:.1f}", str(own[0]["seeds"])]
                print(f"| {way.label} | " + " | ".join(cells) + " |")
    marks = {key: found[key] for key in ("summary", "summary_by_model", "summary_2_4")}
    print("\n```\n" + json.dumps(marks, indent=1) + "\n```")


def plot(found: dict, path: Path) -> None:
    """Perplexity by sparsity on a log axis, one picture per model, with the dense model and a uniform guess."""
    results = [result for result in found["results"] if result["pattern"] == "unstructured"]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(results), figsize=(5.5 * len(results), 4), squeeze=False)
        for axis, result in zip(axes[0], results):
            levels = sorted({row["sparsity"] for row in result["rows"]})
            for name, way in WAYS.items():
                rows = {row["sparsity"]: row["perplexity"] for row in result["rows"] if row["way"] == name}
                # Beyond a uniform guess a model is broken, and by how much says nothing.
                values = [min(rows[level], 4 * result["vocabulary"]) for level in levels if level in rows]
                axis.plot(
                    [place for place, level in enumerate(levels) if level in rows], values, marker="o", markersize=4,
                    color=way.colour, label=way.label,
                )
            axis.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
            axis.axhline(result["dense"], color="black", linestyle="--", linewidth=1, label="dense")
            axis.axhline(result["vocabulary"], color="black", linestyle=":", linewidth=1, label="uniform guess")
            axis.set(
                xlabel="sparsity", ylabel="perplexity", yscale="log", title=result["model"],
                ylim=(result["dense"] * 0.8, 3 * result["vocabulary"]),
            )
        names = axes[0][0].get_legend_handles_labels()
        figure.legend(*names, fontsize=8, ncol=5, loc="upper center", bbox_to_anchor=(0.5, 0.0))
        figure.savefig(path)
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON to write")
    parser.add_argument("--model", type=Path, nargs="+", metavar="DIR", help="instead of the two checkpoints")
    parser.add_argument("--ways", default=",".join(WAYS), help="default: all of %(default)s")
    parser.add_argument("--levels", default=",".join(map(str, LEVELS)))
    parser.add_argument("--seeds", default="0,1,2")
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
    levels, seeds = ([float(v) for v in args.levels.split(",")], [int(v) for v in args.seeds.split(",")])
    levels, seeds, size = ([0.5, 0.9], [0], 64) if args.quick else (levels, seeds, 128)
    ways = list(METHODS) if args.quick else args.ways.split(",")
    store = args.output.with_suffix(".cells")
    folders = args.model or [DATA / "models" / name for name in MODELS]
    checkpoints = [Checkpoint(folder, size, store, seeds) for folder in folders]
    for seed in seeds:
        for checkpoint in checkpoints:
            checkpoint.run(levels, seed, "unstructured", ways)
            if not args.quick:
                checkpoint.run([0.5], seed, "2:4", ways)
        found = write(args, checkpoints, size)
    if not args.model:
        for checkpoint in checkpoints:
            checkpoint.measure_memory()
        found = write(args, checkpoints, size)
    print(json.dumps({key: found[key] for key in ("summary", "summary_by_model", "summary_2_4")}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
