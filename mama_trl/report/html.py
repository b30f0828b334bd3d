"""One HTML file that opens offline, with the pictures inside."""

import base64

from jinja2 import Environment, PackageLoader

from ..errors import MamaError, first_line
from .check import check_report
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


def rendered(report: dict, where: str) -> tuple[str, dict[str, bytes]]:
    """(the page, PNG by file name) of a report; nothing is written here.

    Args:
        where: its file, for what is said of a damaged one.

    Raises:
        MamaError: the report is damaged.
    """
    check_report(report, where)
    try:
        drawn = draw_all(report)
        return page_of(report, drawn), {name: data for name, (data, _) in drawn.items()}
    except Exception as error:  # what no check of types foresees, such as a title that is no text for a plot
        raise MamaError(f"{where} is damaged ({first_line(error)}): run `mama run` again.") from error


def page_of(report: dict, drawn: dict[str, tuple[bytes, str]]) -> str:
    """The page, with the pictures inside."""
    pictures = [
        {"name": name, "caption": caption, "data": base64.b64encode(data).decode()}
        for name, (data, caption) in drawn.items()
    ]
    environment = Environment(loader=PackageLoader("mama_trl.report", "."), autoescape=True)
    environment.filters["number"] = number
    return environment.get_template("template.html.jinja").render(
        report=report, headline=headline(report), rows=rows(report), pictures=pictures, labels=report.get("labels", {})
    )
