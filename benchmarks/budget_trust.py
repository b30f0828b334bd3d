"""How far MAMA's predicted losses are trusted when the sparsity is shared: excess by `blend`, `shrink` and level.

    python -m benchmarks.budget_trust --output trust.json [--model DIR ...] [--levels 0.5,0.9]

`trust` in mama_trl/selection/allocation.py was chosen by this table. Calibration: 128 blocks of 256 tokens of the
training text drawn with the seed; measured on 64 blocks of the *end* of the same training text, of which no calibration
draw takes any, so that no benchmark's evaluation text decides. Rows are written as they are measured and are not
measured again (OUTPUT.rows). The summary says, for every level, which setting has the least excess relative to uniform,
as the mean over models of the ratio, and that of the default.
"""

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math

from benchmarks.common import parser, report
from mama_trl.compare.trial import dense_state, trial
from mama_trl.evaluation.loading import load_model, load_tokenizer
from mama_trl.evaluation.perplexity import perplexity
from mama_trl.evaluation.text import blocks, read_text
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import predicted_losses
from mama_trl.selection.allocation import shares_by_loss

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SETTINGS = ((0.4, 0.0), (0.7, 0.0), (0.7, 0.25), (0.7, 0.5), (0.7, 0.75), (1.0, 0.75))  # (blend, shrink)


def excesses(folder: str, text: str, levels, seed: int, known: dict, keep, measured: bool) -> None:
    """Measures what `known` lacks and hands each row to `keep`."""
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    cut = len(text) * 9 // 10
    rows = blocks(tokenizer, text[:cut], 256, limit=128, seed=seed)
    apart = blocks(tokenizer, text[cut:], 256, limit=64)
    dense, reference = dense_state(model), perplexity(model, apart)["nats"]
    worst = math.log(model.config.get_text_config().vocab_size)
    targets = find_targets(model, experts=True)
    sizes = [target.shape[0] * target.shape[1] for target in targets]
    histograms = predicted_losses(model, rows, targets)
    for level in levels:
        for blend, shrink in ((0.0, 0.0), *SETTINGS, (None, None)):
            key = (Path(folder).name, level, f"{blend:g} {shrink:g}" if blend is not None else "default")
            if key in known:
                continue
            shares = shares_by_loss(histograms, sizes, level, blend, shrink)
            by_name = {target.name: share for target, share in zip(targets, shares)}
            found = trial(model, dense, rows, apart, 8, sparsity=level, layer_sparsity=by_name)
            keep(key, min(found["nats"], worst) - reference)
        key = (Path(folder).name, level, "measured")
        if measured and key not in known:
            found = trial(model, dense, rows, apart, 8, sparsity=level, budget="measured")
            keep(key, min(found["nats"], worst) - reference)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", nargs="+", metavar="DIR", default=[
        str(DATA / "models" / name) for name in ("stories260K", "babyllama-tok105")
    ])
    options.add_argument("--text", metavar="FILE", default=str(DATA / "tinystories" / "train.jsonl"))
    options.add_argument("--levels", default=",".join(map(str, LEVELS)))
    options.add_argument("--measured", action="store_true", help="the budget `measured` too, which takes longer")
    args = options.parse_args()
    levels = (0.5, 0.9) if args.quick else [float(level) for level in args.levels.split(",")]
    store = Path(f"{args.output}.rows") if args.output else None
    known: dict[tuple, float] = {}
    if store and store.is_file():
        known = {tuple(key): value for key, value in map(json.loads, store.read_text().splitlines())}

    def keep(key: tuple, excess: float) -> None:
        known[key] = excess
        print(json.dumps([key, round(excess, 4)]), flush=True)
        if store:
            with open(store, "a") as file:
                file.write(json.dumps([key, excess]) + "\n")

    text = read_text(args.text)
    for folder in args.model[:1] if args.quick else args.model:
        excesses(folder, text, levels, args.seed, known, keep, args.measured)
    models = list(dict.fromkeys(key[0] for key in known))
    settings = list(dict.fromkeys(key[2] for key in known))
    rows = [
        {"model": model, "sparsity": level, **{name: known[model, level, name] for name in settings}}
        for model in models for level in levels if all((model, level, name) in known for name in settings)
    ]
    summary: dict[str, float] = {}
    for level in levels:
        own = [row for row in rows if row["sparsity"] == level]
        ratios = {name: sum(row[name] / max(row["0 0"], 1e-9) for row in own) / len(own) for name in settings}
        best = min(ratios, key=ratios.get)
        print(f"{level:g}: best is blend and shrink {best}")
        summary |= {f"best_{level:g}": ratios[best], f"default_{level:g}": ratios["default"]}
    report(rows, summary, args)


if __name__ == "__main__":
    main()
