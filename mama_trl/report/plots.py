"""The report's pictures. Each function takes the report and an Axes or Figure; nothing here computes results."""

import io
from typing import Callable

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = BLUE, ORANGE, GREEN, RED, GREY, PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#666666", "#CC79A7"
METHOD_COLOURS = {"mama": BLUE, "magnitude": GREY, "wanda": ORANGE, "sparsegpt": GREEN, "alps": PINK}

STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "figure.dpi": 150, "savefig.bbox": "tight", "legend.frameon": False,
}


def called(report: dict, method: str) -> str:
    """How a method is called: `labels` of the report, else its own name."""
    return report.get("labels", {}).get(method, method)


def sparsity_and_reward(report: dict):
    """Sparsity (step line) and mean reward over GRPO steps."""
    history = report.get("history", {})
    if not history.get("sparsity") or not history.get("reward"):
        return None
    figure, left = plt.subplots(figsize=(7, 3.4))
    steps, reward = zip(*history["reward"])
    left.plot(steps, reward, color=ORANGE, marker=".", label="mean reward")
    left.set(xlabel="GRPO step", ylabel="mean reward", ylim=(0, 1))
    right = left.twinx()
    right.step(*zip(*history["sparsity"]), where="post", color=BLUE, label="sparsity")
    right.set(ylabel="sparsity", ylim=(0, 1))
    right.grid(False)
    lines = left.get_lines() + right.get_lines()
    left.legend(lines, [line.get_label() for line in lines], loc="upper center", ncol=2, bbox_to_anchor=(0.5, 1.15))
    return figure


def against_baselines(report: dict):
    """Perplexity (log axis) and task accuracy, one-shot and distilled, with the dense model as a line."""
    if not report.get("baselines"):
        return None
    baselines = report["baselines"].items()
    rows = [(called(report, name), result["oneshot"], result["distilled"]) for name, result in baselines]
    stages = report.get("mama_stages", {})
    rows.append(("MAMA", stages.get("grpo") or stages.get("oneshot") or {}, report["pruned"]))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
    positions = np.arange(len(rows))
    for axis, key, label in ((axes[0], "perplexity", "perplexity"), (axes[1], "accuracy", "task accuracy")):
        for offset, index, colour, name in ((-0.2, 1, GREY, "before distillation"), (0.2, 2, BLUE, "distilled")):
            values = [row[index].get(key, np.nan) for row in rows]
            bars = axis.bar(positions + offset, values, 0.38, color=colour, label=name)
            texts = [number(v) if key == "perplexity" else f"{v:.2f}" for v in values]
            axis.bar_label(bars, texts, fontsize=7, padding=1)
        axis.axhline(report["dense"][key], color=RED, linestyle="--", linewidth=1, label="dense")
        axis.set_xticks(positions, [row[0] for row in rows], fontsize=9)
        axis.set_ylabel(label)
    axes[0].set_yscale("log")
    axes[0].margins(y=0.15)
    axes[1].set_ylim(0, 1.1)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncol=3, bbox_to_anchor=(0.5, 1.06))
    figure.tight_layout()
    return figure


def sparsity_map(report: dict):
    """Sparsity per block and kind of matrix, with numbers."""
    rows = [row for row in report.get("sparsity_by_matrix", []) if row["block"] is not None]
    if not rows:
        return None
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    depth = max(row["block"] for row in rows) + 1
    grid = np.full((depth, len(kinds)), np.nan)
    for row in rows:
        grid[row["block"], kinds.index(row["kind"])] = row["sparsity"]
    figure, axis = plt.subplots(figsize=(1.2 + 0.95 * len(kinds), 1.4 + 0.42 * depth))
    image = axis.imshow(grid, cmap="cividis", vmin=np.nanmin(grid) - 0.02, vmax=np.nanmax(grid) + 0.02, aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    if depth <= 40:
        for (y, x), value in np.ndenumerate(grid):
            if not np.isnan(value):
                colour = "black" if value > middle else "white"
                axis.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    axis.set_xticks(range(len(kinds)), kinds, rotation=30, ha="right")
    axis.set_yticks(range(depth) if depth <= 40 else range(0, depth, 4))
    axis.set(ylabel="block")
    axis.grid(False)
    figure.colorbar(image, ax=axis, label="sparsity", fraction=0.05, pad=0.02)
    return figure


def attribution(report: dict):
    """Distribution of the reward attribution of kept and of pruned connections."""
    data = report.get("attribution")
    if not data:
        return None
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for key, colour in (("pruned", GREY), ("kept", BLUE)):
        counts = np.array(data[key], dtype=float)
        axis.stairs(counts / max(counts.sum(), 1), data["edges_log10"], fill=True, color=colour, alpha=0.55, label=key)
    ticks = range(int(data["edges_log10"][0]), int(data["edges_log10"][-1]) + 1)
    axis.set_xticks(ticks, [f"$10^{{{t}}}$" for t in ticks])
    axis.set(xlabel="reward attribution, relative to the mean connection", ylabel="share of connections")
    axis.legend()
    return figure


def trajectory(report: dict):
    """Mean |w| of what was kept and pruned in the end, over all stages."""
    data = report.get("trajectory")
    if not data or not data.get("steps"):
        return None
    figure, axis = plt.subplots(figsize=(8, 3.8))
    for key, colour in (("kept", BLUE), ("pruned", ORANGE)):
        axis.fill_between(data["steps"], data[f"{key}_p10"], data[f"{key}_p90"], color=colour, alpha=0.18, linewidth=0)
        axis.plot(data["steps"], data[key], color=colour, label=f"{key} in the end (mean, 10th to 90th percentile)")
    top = axis.get_ylim()[1]
    width = data["steps"][-1]
    for index, (name, start) in enumerate(data["stages"]):
        axis.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
        # A short stage's name stands left of its line, so that it does not run into the next one.
        left = index + 1 < len(data["stages"]) and data["stages"][index + 1][1] - start < 0.05 * width
        axis.text(start, top, f" {name} ", va="top", ha="right" if left else "left", fontsize=8, color=GREY)
    axis.set(xlabel="optimizer step, all stages", ylabel="|w|", ylim=(0, top * 1.02))
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncol=2, fontsize=8)
    return figure


def distillation(report: dict):
    """KL to the teacher over the distillation steps of every method."""
    losses = report.get("history", {}).get("distill_loss", {})
    if not any(losses.values()):
        return None
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for name, curve in losses.items():
        if curve:
            axis.plot(*zip(*curve), color=METHOD_COLOURS.get(name), label=called(report, name))
    axis.set(xlabel="distillation step", ylabel="KL to the dense teacher (nats)", yscale="log")
    axis.legend()
    return figure


PLOTS: dict[str, tuple[Callable, str]] = {
    "sparsity_and_reward": (sparsity_and_reward, "Sparsity and mean reward while GRPO prunes."),
    "against_baselines": (
        against_baselines,
        "Perplexity on held-out text (lower is better) and accuracy on held-out operands, before and after the same "
        "distillation. MAMA's first bar is after GRPO.",
    ),
    "sparsity_map": (sparsity_map, "Where the budget went: sparsity of every matrix."),
    "attribution": (attribution, "Reward attribution of the connections that were kept and pruned."),
    "trajectory": (trajectory, "How far the kept and the pruned connections moved through all stages."),
    "distillation": (distillation, "Distance to the dense teacher during distillation."),
}


def number(value: float) -> str:
    """12.3, 456, 1.2e+06."""
    if value != value:
        return "n/a"
    if value >= 1e5:
        return f"{value:.1e}"
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def png(figure) -> bytes:
    """A figure as a PNG file; the figure is closed."""
    with io.BytesIO() as file:
        try:
            figure.savefig(file, format="png")
        finally:
            plt.close(figure)
        return file.getvalue()


def draw_all(report: dict) -> dict[str, tuple[bytes, str]]:
    """PNG and caption, by file name, of every picture that the report has data for."""
    drawn = {}
    with plt.rc_context(STYLE):
        for name, (draw, caption) in PLOTS.items():
            figure = draw(report)
            if figure is not None:
                drawn[f"{name}.png"] = (png(figure), caption)
    return drawn
