"""Tables and plots of `mama levels` and `mama ablation`: variants by sparsity, one protocol."""

import csv
import io
import math
from pathlib import Path

import matplotlib.pyplot as plt
from rich.console import Console
from rich.table import Table

from ..disk.writing import write_bytes, write_json, write_text
from ..report.plots import COLOURS, METHOD_COLOURS, STYLE, number, png
from ..solvers.methods import METHODS

LABELS = {name: method.label for name, method in METHODS.items()}
WIDTH = 100  # columns of a terminal that every table fits into


def write_comparison(result: dict, folder: str | Path, name: str) -> None:
    """Prints the table and writes NAME.json, NAME.csv and NAME.png.

    Args:
        result: `model`, `dense` (perplexity), `protocol`, `trials` (one per seed) and `rows` (means over seeds) of
            `method`, `sparsity`, `perplexity`, `deviation`, `excess`; with `part`, rows are grouped by it.
        name: `levels` or `ablation`.
    """
    folder = Path(folder)
    table, picture = comparison_table(result), _plot(result)
    write_json(folder / f"{name}.json", result)
    write_text(folder / f"{name}.csv", _csv(result["rows"]))
    write_bytes(folder / f"{name}.png", picture)
    Console(width=WIDTH).print(table)


def _csv(rows: list[dict]) -> str:
    with io.StringIO(newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()


def comparison_table(result: dict) -> Table:
    """Methods down, levels across: perplexity, and beneath it the deviation over seeds in percent.

    The best of each level (and part) is bold.
    """
    rows = result["rows"]
    levels = sorted({row["sparsity"] for row in rows})
    found = {(row.get("part"), row["method"], row["sparsity"]): row for row in rows}
    protocol = result["protocol"]
    table = Table(
        title=f"Perplexity of {result['model']}, dense {number(result['dense'])}",
        caption=f"{protocol['tokens']:,} tokens of {Path(protocol['text']).name}, sequence length "
        f"{protocol['sequence_length']}, {protocol['calibration_tokens']:,} calibration tokens, "
        f"seeds {', '.join(map(str, protocol['seeds']))}"
        + (" (beneath: standard deviation over them)" if len(protocol["seeds"]) > 1 else ""),
        padding=(0, 0, 0, 1),
    )
    table.add_column("method", overflow="fold")
    for level in levels:
        table.add_column(f"{level:g}", justify="right", no_wrap=True)
    for part in dict.fromkeys(row.get("part") for row in rows):
        methods = list(dict.fromkeys(row["method"] for row in rows if row.get("part") == part))
        here = {key: row for key, row in found.items() if key[0] == part}
        best = {level: min(r["nats"] for k, r in here.items() if k[2] == level) for level in levels}
        if part:
            table.add_section()
            table.add_row(f"[italic]{part}[/italic]")
        for method in methods:
            cells = []
            for level in levels:
                row = here.get((part, method, level))
                if row is None:
                    cells.append("")
                    continue
                text = number(row["perplexity"])
                text = f"[bold]{text}[/bold]" if row["nats"] == best[level] else text
                cells.append(text + (f"\n±{_percent(row['deviation'])}" if row["seeds"] > 1 else ""))
            table.add_row(LABELS.get(method, method), *cells)
    return table


def _percent(deviation: float) -> str:
    """Deviation of the log perplexity as a share of the perplexity."""
    return f"{100 * deviation:.1f}%" if deviation < 0.1 else f"{100 * deviation:.0f}%"


def _plot(result: dict) -> bytes:
    """The picture as a PNG file."""
    parts = list(dict.fromkeys(row.get("part") for row in result["rows"]))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(parts), figsize=(7 if len(parts) == 1 else 5 * len(parts), 4), squeeze=False)
        for axis, part in zip(axes[0], parts):
            rows = [row for row in result["rows"] if row.get("part") == part]
            methods = list(dict.fromkeys(row["method"] for row in rows))
            taken = {METHOD_COLOURS.get(method) for method in methods}
            free = iter(colour for colour in COLOURS if colour not in taken)
            for method in methods:
                points = sorted((r["sparsity"], r["perplexity"], r["deviation"]) for r in rows if r["method"] == method)
                levels, values, deviations = zip(*points)
                colour = METHOD_COLOURS.get(method) or next(free, None)
                label = LABELS.get(method, method)
                line = axis.plot(levels, values, marker="o", markersize=4, color=colour, label=label)
                low = [v * math.exp(-d) for v, d in zip(values, deviations)]
                high = [v * math.exp(d) for v, d in zip(values, deviations)]
                axis.fill_between(levels, low, high, color=line[0].get_color(), alpha=0.15, linewidth=0)
            axis.axhline(result["dense"], color="black", linestyle="--", linewidth=1, label="dense")
            axis.axhline(result["vocabulary"], color="black", linestyle=":", linewidth=1, label="uniform guess")
            axis.set(xlabel="sparsity", ylabel="perplexity", yscale="log", title=part or "")
            axis.legend(fontsize=8)
        return png(figure)
