"""How much of the budget across layers should follow sensitivity: MAMA's excess by blend and level.

    python -m benchmarks.budget_blend --output blend.json [--model DIR ...]

`default_blend` in mama_trl/config.py was chosen by this table. Calibration: 128 blocks of 256 tokens of
the training text drawn with the seed; measured on 64 blocks of the *end* of the same training text, of which no
calibration draw takes any, so that no benchmark's evaluation text decides. The summary says, for every level, which
blend has the least mean excess over the models, and the excess of the default over that.
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

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BLENDS = (0.0, 0.2, 0.4, 0.6, 0.8)


def excesses(folder: str, text: str, levels, blends, seed: int) -> list[dict]:
    tokenizer, model = load_tokenizer(folder), load_model(folder)
    cut = len(text) * 9 // 10
    rows = blocks(tokenizer, text[:cut], 256, limit=128, seed=seed)
    apart = blocks(tokenizer, text[cut:], 256, limit=64)
    dense, reference = dense_state(model), perplexity(model, apart)["nats"]
    worst = math.log(model.config.get_text_config().vocab_size)
    result = []
    for level in levels:
        row = {"model": Path(folder).name, "sparsity": level}
        for blend in (*blends, None):
            found = trial(model, dense, rows, apart, 8, sparsity=level, budget_blend=blend)
            row["default" if blend is None else f"{blend:g}"] = min(found["nats"], worst) - reference
        result.append(row)
        print(json.dumps(row), flush=True)
    return result


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", nargs="+", metavar="DIR", default=[
        str(DATA / "models" / name) for name in ("stories260K", "babyllama-tok105")
    ])
    options.add_argument("--text", metavar="FILE", default=str(DATA / "tinystories" / "train.jsonl"))
    args = options.parse_args()
    levels = (0.5, 0.9) if args.quick else LEVELS
    text = read_text(args.text)
    folders = args.model[:1] if args.quick else args.model
    rows = [row for folder in folders for row in excesses(folder, text, levels, BLENDS, args.seed)]
    summary = {}
    for level in levels:
        own = [row for row in rows if row["sparsity"] == level]
        means = {blend: sum(row[f"{blend:g}"] for row in own) / len(own) for blend in BLENDS}
        best = min(means, key=means.get)
        summary[f"best_blend_{level:g}"] = best
        mean = sum(row["default"] for row in own) / len(own)
        summary[f"default_over_best_{level:g}"] = mean / max(means[best], 1e-9)
    report(rows, summary, args)


if __name__ == "__main__":
    main()
