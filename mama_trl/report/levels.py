"""The table of `mama levels`: methods by sparsity, one protocol."""

import csv
import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from .plots import LABELS, METHOD_COLOURS, STYLE, number


def write_levels(result: dict, folder: str | Path) -> None:
    """Prints the table and writes levels.json, levels.csv and levels.png.

    Args:
        result: `model`, `dense` (perplexity), `protocol`, `rows` of `method, sparsity, perplexity`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "levels.json", json.dumps(result, indent=1))
    with open(folder / ".levels.csv.tmp", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["method", "sparsity", "perplexity"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(result["rows"])
    os.replace(folder / ".levels.csv.tmp", folder / "levels.csv")
    _plot(result, folder / "levels.png")
    Console().print(levels_table(result))


def levels_table(result: dict) -> Table:
    """Methods down, levels across; the best of each level is bold."""
    levels = sorted({row["sparsity"] for row in result["rows"]})
    found = {(row["method"], row["sparsity"]): row["perplexity"] for row in result["rows"]}
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    protocol = result["protocol"]
    table = Table(
        title=f"Perplexity of {result['model']}, dense {number(result['dense'])}",
        caption=f"{protocol['tokens']:,} tokens, sequence length {protocol['sequence_length']}, "
        f"{protocol['calibration_tokens']:,} calibration tokens, seed {protocol['seed']}",
    )
    table.add_column("method")
    for level in levels:
        table.add_column(f"{level:g}", justify="right")
    best = {level: min(found[m, level] for m in methods) for level in levels}
    for method in methods:
        cells = []
        for level in levels:
            value = found[method, level]
            cells.append(f"[bold]{number(value)}[/bold]" if value == best[level] else number(value))
        table.add_row(LABELS.get(method, method), *cells)
    return table


def _plot(result: dict, path: Path) -> None:
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 4))
        for method in dict.fromkeys(row["method"] for row in result["rows"]):
            points = sorted((r["sparsity"], r["perplexity"]) for r in result["rows"] if r["method"] == method)
            axis.plot(*zip(*points), marker="o", color=METHOD_COLOURS.get(method), label=LABELS.get(method, method))
        axis.axhline(result["dense"], color="black", linestyle="--", linewidth=1, label="dense")
        axis.set(xlabel="sparsity", ylabel="perplexity", yscale="log")
        axis.legend()
        figure.savefig(path)
        plt.close(figure)


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
