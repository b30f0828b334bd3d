"""One HTML file that opens offline, with the pictures inside."""

import base64
import os
from pathlib import Path

from jinja2 import Environment, PackageLoader

from .plots import draw_all, number
from .summary import rows


def headline(report: dict) -> str:
    """One sentence computed from the numbers; claims a win only where there is one."""
    dense, pruned = report["dense"], report["pruned"]
    text = (
        f"At {pruned['sparsity']:.0%} sparsity the perplexity is {number(pruned['perplexity'])} (dense "
        f"{number(dense['perplexity'])}) and the task accuracy {pruned['accuracy']:.1%} (dense {dense['accuracy']:.1%})"
    )
    distilled = [result["distilled"] for result in report.get("baselines", {}).values()]
    if not distilled:
        return f"{text}."
    better = all(pruned["perplexity"] < d["perplexity"] for d in distilled)
    right = all(pruned["accuracy"] > d["accuracy"] for d in distilled)
    verdict = {
        (True, True): "better than every distilled baseline in both",
        (True, False): "better than every distilled baseline in perplexity, but not in accuracy",
        (False, True): "better than every distilled baseline in accuracy, but not in perplexity",
        (False, False): "not better than every distilled baseline",
    }[better, right]
    return f"{text}: {verdict}."


def write_report(report: dict, folder: str | Path) -> Path:
    """Writes the PNG plots and `report.html` into `folder`; returns the path of the latter."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [
        {
            "name": name,
            "caption": caption,
            "data": base64.b64encode((folder / name).read_bytes()).decode(),
        }
        for name, caption in draw_all(report, folder).items()
    ]
    environment = Environment(loader=PackageLoader("mama_trl.report", "."), autoescape=True)
    environment.filters["number"] = number
    page = environment.get_template("template.html.jinja").render(
        report=report, headline=headline(report), rows=rows(report), pictures=pictures, labels=report.get("labels", {})
    )
    path = folder / "report.html"
    temporary = folder / ".report.html.tmp"
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path
