"""Whole structures on checkpoints that nobody here trained: how much smaller, how much faster, at what loss.

    python benchmarks/structures.py --output structures.json [--quick]

Protocol of ../shared/data/README.md: 128 blocks of 256 tokens of train.jsonl drawn with each seed for calibration, the
first 128 blocks of valid.jsonl for evaluation. Excess loss = log perplexity minus that of the dense model, log
perplexities capped at log(vocabulary). Speed: one forward pass of 16 × 256 tokens in plain PyTorch, of the model as
`AutoModelForCausalLM.from_pretrained` loads it from disk, dense and smaller in turn, median of all turns.
"""

import argparse
import copy
import json
import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mama_trl.evaluation.perplexity import perplexity
from mama_trl.evaluation.size import model_bytes
from mama_trl.evaluation.text import blocks, read_text
from mama_trl.pruning.structures.remove import prune_structures

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
MODELS = ("stories260K", "babyllama-tok105")
LEVELS = [("neurons", 0.25), ("neurons", 0.5), ("neurons", 0.75), ("heads", 0.5)]
# The name in the table, the choice of structures, and what happens to those that stay.
METHODS = {
    "mama": ("mama", "least_squares"),
    "wanda, refitted": ("wanda", "least_squares"),
    "magnitude, refitted": ("magnitude", "least_squares"),
    "random, refitted": ("random", "least_squares"),
    "magnitude": ("magnitude", "none"),
    "random": ("random", "none"),
}


def seconds(models: list, rows: torch.Tensor, turns: int) -> list[float]:
    """Median seconds of a forward pass of each model, measured in turn so that a busy machine slows all alike."""
    taken = [[] for _ in models]
    with torch.no_grad():
        for turn in range(turns + 1):
            for times, model in zip(taken, models):
                start = time.perf_counter()
                model(input_ids=rows, use_cache=False)
                if turn:  # the first one warms up
                    times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in taken]


def reload(model) -> tuple:
    """(the model as it loads from disk, bytes of its weights)."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval(), model_bytes(folder)


def measure_speed(name: str, label: str, dense, small, rows, turns: int) -> dict:
    (dense, dense_bytes), (small, small_bytes) = reload(dense), reload(small)
    before, after = seconds([dense, small], rows, turns)
    return {
        "model": name, "structures": label, "speed_up": before / after, "size_ratio": small_bytes / dense_bytes,
        "seconds_dense": before, "seconds": after, "parameters_dense": dense.num_parameters(),
        "parameters": small.num_parameters(), "config": {
            key: getattr(small.config, key)
            for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
        },
    }


def wide_model() -> LlamaForCausalLM:
    """Random weights, for the clock alone: wide enough that arithmetic, not Python, takes the time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=16,
        num_key_value_heads=8, tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, help="JSON file")
    parser.add_argument("--quick", action="store_true", help="one model, one seed, fewer blocks and levels")
    args = parser.parse_args()
    models, levels = (MODELS[:1], [("neurons", 0.5), ("heads", 0.5)]) if args.quick else (MODELS, LEVELS)
    seeds, count, turns = (range(1), 32, 5) if args.quick else (range(3), 128, 15)
    quality, speed = [], []

    def write() -> dict:
        report = {
            "protocol": {
                "calibration_blocks": count, "evaluation_blocks": count, "sequence_length": 256, "seeds": len(seeds),
                "threads": torch.get_num_threads(), "torch": torch.__version__, "processor": os.cpu_count(),
            },
            "summary": summary(quality, speed), "quality": quality, "speed": speed,
        }
        Path(args.output).write_text(json.dumps(report, indent=1))
        return report

    train, valid = (read_text(DATA / "tinystories" / name) for name in ("train.jsonl", "valid.jsonl"))
    for name in models:
        source = DATA / "models" / name
        tokenizer = AutoTokenizer.from_pretrained(source)
        dense = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
        held = blocks(tokenizer, valid, 256, limit=count)
        calibration = [blocks(tokenizer, train, 256, limit=count, seed=seed) for seed in seeds]
        cap = math.log(dense.config.vocab_size)
        base = perplexity(dense, held)["nats"]
        print(f"{name}: dense perplexity {math.exp(base):.3f}", flush=True)

        def smaller(structure, share, method, redistribution, seed, start=None):
            return prune_structures(
                copy.deepcopy(start or dense), calibration[seed], structure, share, method, redistribution, seed=seed,
                progress=False,
            ).eval()

        for structure, share in levels:
            for label, (method, redistribution) in METHODS.items():
                nats = []
                for seed in seeds:
                    small = smaller(structure, share, method, redistribution, seed)
                    nats.append(perplexity(small, held)["nats"])
                excess = [min(value, cap) - min(base, cap) for value in nats]
                quality.append({
                    "model": name, "structures": structure, "sparsity": share, "method": label,
                    "perplexity": math.exp(statistics.mean(nats)), "dense_perplexity": math.exp(base),
                    "excess": statistics.mean(excess), "excess_by_seed": excess,
                })
                print(f"{name} {structure} {share}: {label:<20} perplexity {quality[-1]['perplexity']:.3f}", flush=True)
                if label == "mama":
                    speed.append(measure_speed(name, f"{structure} {share}", dense, small, held[:16], turns))
                write()
        both = smaller("neurons", 0.5, "mama", "least_squares", 0, smaller("heads", 0.5, "mama", "least_squares", 0))
        speed.append(measure_speed(name, "heads 0.5, neurons 0.5", dense, both, held[:16], turns))
        speed[-1]["perplexity"] = perplexity(both, held)["perplexity"]
        write()
    wide = wide_model()
    rows = torch.randint(0, 2048, (4, 256), generator=torch.Generator().manual_seed(0))
    small = prune_structures(copy.deepcopy(wide), rows, "heads", 0.5, "magnitude", "none", progress=False)
    small = prune_structures(small, rows, "neurons", 0.5, "magnitude", "none", progress=False).eval()
    speed.append(measure_speed("random weights, 19 M", "heads 0.5, neurons 0.5", wide, small, rows, turns))
    for row in speed:
        print(f"{row['model']} {row['structures']}: {row['speed_up']:.2f} times as fast, "
              f"{row['size_ratio']:.2f} of the bytes", flush=True)
    print(json.dumps(write()["summary"], indent=1))


def summary(quality: list[dict], speed: list[dict]) -> dict:
    """Means over models and levels; speed and size over the checkpoints with half of both structures removed."""

    def excess(label: str) -> float:
        found = [row["excess"] for row in quality if row["method"] == label]
        return statistics.mean(found) if found else math.nan

    ours = excess("mama")
    result = {
        f"excess_vs_{label.replace(', ', '_')}": ours / excess(label)
        for label in METHODS if label != "mama" and not math.isnan(excess(label))
    }
    both = [row for row in speed if row["structures"] == "heads 0.5, neurons 0.5" and "perplexity" in row]
    if both:
        result["speed_up"] = statistics.geometric_mean(row["speed_up"] for row in both)
        result["size_ratio"] = statistics.geometric_mean(row["size_ratio"] for row in both)
    return result


if __name__ == "__main__":
    main()
