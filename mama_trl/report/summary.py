"""The table at the end of a run, for the terminal and for the page."""

from rich.console import Console
from rich.table import Table

from .plots import called, number


def rows(report: dict) -> list[dict]:
    """`model, sparsity, perplexity, accuracy, bytes` of dense, pruned and every baseline."""
    dense, pruned = report["dense"], report["pruned"]
    result = [_row("dense", {**dense, "sparsity": 0.0}, dense.get("bytes"))]
    for name, stages in report.get("baselines", {}).items():
        for stage, values in stages.items():
            when = "one-shot" if stage == "oneshot" else stage
            result.append(_row(f"{called(report, name)}, {when}", values))
    stages = report.get("mama_stages", {})
    for key, text in (("oneshot", "MAMA, one-shot"), ("grpo", "MAMA, after GRPO")):
        if key in stages:
            result.append(_row(text, {"sparsity": pruned["sparsity"], **stages[key]}))
    result.append(_row("MAMA, distilled", pruned, pruned.get("bytes_packed")))
    return result


def _row(model: str, values: dict, size: int | None = None) -> dict:
    return {
        "model": model,
        "sparsity": f"{values['sparsity']:.1%}",
        "perplexity": number(values["perplexity"]),
        "accuracy": f"{values['accuracy']:.3f}",
        "bytes": f"{size:,}" if size else "",
    }


def summary_table(report: dict) -> Table:
    """Fits 80 columns."""
    protocol = report.get("protocol", {})
    table = Table(title=report.get("title", "MAMA"), caption=(
        f"perplexity over {protocol.get('tokens', 0):,} held-out tokens, sequence length "
        f"{protocol.get('sequence_length')}; accuracy on {protocol.get('task_prompts')} held-out prompts; "
        f"seed {report.get('seed')}"
    ))
    table.add_column("model")
    for name in ("sparsity", "perplexity", "accuracy", "bytes"):
        table.add_column(name, justify="right")
    for row in rows(report):
        table.add_row(*row.values(), style="bold" if row["model"] == "MAMA, distilled" else None)
    return table


def print_summary(report: dict) -> None:
    Console().print(summary_table(report))
