"""The table of docs/demo.md: mean and range over the seeds of finished demo runs.

    for seed in 0 1 2; do mama run configs/demo.yaml --seed $seed --output_dir runs/demo-$seed; done
    python benchmarks/demo_table.py runs/demo-0 runs/demo-1 runs/demo-2

Prints Markdown; exits with 1 if MAMA does not beat every distilled baseline: in mean perplexity, in mean accuracy,
and in perplexity on each single seed.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

NAMES = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}


def rows_of(report: dict) -> dict[str, dict]:
    """`perplexity` and `accuracy` by the row's name."""
    rows = {"dense": report["dense"]}
    for key, name in NAMES.items():
        rows[f"{name}, one-shot"] = report["baselines"][key]["oneshot"]
        rows[f"{name}, distilled"] = report["baselines"][key]["distilled"]
    rows["MAMA, one-shot"] = report["mama_stages"]["oneshot"]
    rows["MAMA, after GRPO"] = report["mama_stages"]["grpo"]
    rows["**MAMA, distilled**"] = report["pruned"]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with report.json")
    reports = [json.loads((run / "report.json").read_text()) for run in parser.parse_args().runs]
    tables = [rows_of(report) for report in reports]
    seeds = [report["seed"] for report in reports]
    print("| model | " + " | ".join(f"seed {s}" for s in seeds) + " | mean perplexity | mean accuracy |")
    print("|---|" + "---:|" * (len(seeds) + 2))
    means = {}
    for name in tables[0]:
        cells = [f"{t[name]['perplexity']:.2f} / {t[name]['accuracy']:.3f}" for t in tables]
        means[name] = [statistics.mean(t[name][key] for t in tables) for key in ("perplexity", "accuracy")]
        print(f"| {name} | " + " | ".join(cells) + f" | {means[name][0]:.2f} | {means[name][1]:.3f} |")
    print("\nPerplexity / accuracy. Seconds of each run: " + ", ".join(
        f"{sum(stage['seconds'] for stage in report['stages']):.0f}" for report in reports
    ))
    ours = "**MAMA, distilled**"
    won = all(
        means[ours][0] < means[f"{n}, distilled"][0]
        and means[ours][1] > means[f"{n}, distilled"][1]
        and all(t[ours]["perplexity"] < t[f"{n}, distilled"]["perplexity"] for t in tables)
        for n in NAMES.values()
    )
    print(f"\nMAMA beats every distilled baseline in both means, and in perplexity on every seed: {won}")
    return 0 if won else 1


if __name__ == "__main__":
    sys.exit(main())
