"""Layer error of every one-shot method against ALPS, on the same grams at the same sparsity.

    python -m benchmarks.layer_error --output layer_error.json            # two toys, every matrix: half a minute
    python -m benchmarks.layer_error --output quick.json --quick          # the same code on the last block of each
    python -m benchmarks.layer_error --model FOLDER --blocks 2 18 --text wiki.txt     # some blocks of another model

Sparsity 0.5, 0.7 and 0.9. The grams are those of the dense model over 128 blocks of 256 tokens of training text, drawn
with the seed. Error is ‖X (W - W')ᵀ‖² in double precision; its ratio to ALPS's is averaged over a model's matrices.
Time is processor time of the solver alone, summed over matrices, over ALPS's; the methods take turns on each matrix.
The summary holds, of MAMA, averaged over models,

- `layer_error_vs_alps_0.5` and so on: the ratio at each sparsity; `layer_error_vs_alps` the highest of the three;
- `worst_matrix_vs_alps`: the highest ratio of any single matrix at any sparsity;
- `time_vs_alps`: its time over that of ALPS.

`--model` takes the folder of a saved model or a GGUF file (with `pip install gguf`).
"""

import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from benchmarks.common import parser, report
from mama_trl.calibration.grams import collect
from mama_trl.evaluation.text import blocks, read_text
from mama_trl.model.blocks import find_blocks
from mama_trl.model.targets import find_targets
from mama_trl.solvers.alps import alps
from mama_trl.solvers.magnitude import magnitude
from mama_trl.solvers.mama import mama
from mama_trl.solvers.redistribution import layer_error, least_squares
from mama_trl.solvers.sparsegpt import sparsegpt
from mama_trl.solvers.wanda import wanda

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MODELS = ("stories260K", "babyllama-tok105")
LEVELS = (0.5, 0.7, 0.9)
LENGTH, CALIBRATION = 256, 128


def by_wanda(weight: Tensor, gram: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    return wanda(weight, gram.diagonal().sqrt(), sparsity)


def refitted(weight: Tensor, gram: Tensor, sparsity: float) -> tuple[Tensor, Tensor]:
    """Wanda's mask and the best values on it: what choosing the mask together with the values adds."""
    mask = by_wanda(weight, gram, sparsity)[1]
    return least_squares(weight, gram, mask), mask


METHODS = {
    "magnitude": lambda weight, _, sparsity: magnitude(weight, sparsity),
    "wanda": by_wanda,
    "wanda, refitted": refitted,
    "sparsegpt": sparsegpt,
    "alps": alps,
    "mama": mama,
}


def load(path: Path):
    """(model in fp32, tokenizer) of a folder or a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, extra = (str(path.parent), {"gguf_file": path.name}) if path.is_file() else (str(path), {})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **extra).eval()
    return model, AutoTokenizer.from_pretrained(folder, **extra)


def layers(path: Path, text: Path, seed: int, wanted: list[int] | None) -> list[tuple[Tensor, Tensor]]:
    """(weight (out, in), gram (in, in)) of the matrices of the `wanted` blocks (negative from the end), or of all."""
    model, tokenizer = load(path)
    rows = blocks(tokenizer, read_text(text), LENGTH, limit=CALIBRATION, seed=seed)
    names = [name + "." for name, _ in find_blocks(model)]
    inside = tuple(names if wanted is None else (names[index] for index in wanted))
    targets = [target for target in find_targets(model) if target.module_name.startswith(inside)]
    with torch.no_grad():
        grams = collect(model, targets, lambda: [model(input_ids=b, use_cache=False) for b in rows.split(4)])
    return [(target.matrix.detach().float().clone(), grams[target.name].gram) for target in targets]


def trials(matrices: list[tuple[Tensor, Tensor]], sparsity: float) -> list[dict]:
    """Error and seconds of each method on each matrix."""
    found = []
    for number, (weight, gram) in enumerate(matrices):
        for method, solve in METHODS.items():
            began = time.process_time()
            new, _ = solve(weight, gram, sparsity)
            seconds = time.process_time() - began
            error = float(layer_error(weight.double(), new.double(), gram.double()).sum())
            shape = list(weight.shape)
            found.append({"method": method, "matrix": number, "shape": shape, "error": error, "seconds": seconds})
    return found


def ratios(found: list[dict], method: str) -> tuple[list[float], float]:
    """A method's error over ALPS's on each matrix, and its time over ALPS's on all."""
    own, alone = ([trial for trial in found if trial["method"] == name] for name in (method, "alps"))
    seconds = [sum(trial["seconds"] for trial in part) for part in (own, alone)]
    return [a["error"] / b["error"] for a, b in zip(own, alone)], seconds[0] / seconds[1]


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--data", metavar="FOLDER", type=Path, default=DATA, help="holds models/ and tinystories/")
    options.add_argument("--model", metavar="PATH", type=Path, help="another model in place of the toys")
    options.add_argument("--blocks", metavar="N", type=int, nargs="+", help="which of its blocks; default all")
    options.add_argument("--text", metavar="FILE", type=Path, help="its calibration text; default tinystories")
    args = options.parse_args()
    if args.model is None and not args.data.is_dir():
        print(f"{args.data} is not there: name the data folder with --data, or a --model", file=sys.stderr)
        return 2
    paths = [args.model] if args.model else [args.data / "models" / name for name in MODELS]
    text = args.text or args.data / "tinystories" / "train.jsonl"
    wanted = [-1] if args.quick and args.blocks is None else args.blocks
    rows, kept = [], {}
    mine: dict[str, list] = {"worst": [], "time": [], **{f"{level:g}": [] for level in LEVELS}}
    for path in paths:
        matrices = layers(path, text, args.seed, wanted)
        trials(matrices[:1], LEVELS[0])  # what the first call of anything costs is no method's own
        found = {level: trials(matrices, level) for level in LEVELS}
        every = [trial for part in found.values() for trial in part]
        kept[path.stem] = {f"{level:g}": part for level, part in found.items()}
        for method in METHODS:
            row = {"model": path.stem[:20], "method": method}
            for level, part in found.items():
                row[f"error {level:g}"] = statistics.mean(ratios(part, method)[0])
                if method == "mama":
                    mine[f"{level:g}"].append(row[f"error {level:g}"])
            errors, row["time"] = ratios(every, method)
            row["worst"] = max(errors)
            rows.append(row)
        mine["worst"].append(row["worst"])
        mine["time"].append(row["time"])
    at = {f"layer_error_vs_alps_{level:g}": statistics.mean(mine[f"{level:g}"]) for level in LEVELS}
    summary = {
        "layer_error_vs_alps": max(at.values()), **at, "worst_matrix_vs_alps": max(mine["worst"]),
        "time_vs_alps": statistics.mean(mine["time"]),
    }
    report(rows, summary, args, trials=kept, calibration_blocks=CALIBRATION, sequence_length=LENGTH, levels=LEVELS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
