"""Writes a run's report: the page and its pictures, each file whole or not there."""

from pathlib import Path

from ..disk.writing import write_bytes, write_text
from ..report.html import rendered


def write_report(report: dict, folder: str | Path) -> Path:
    """Writes the PNG plots and `report.html` into `folder`; returns the path of the latter.

    Raises:
        MamaError: the report is damaged; nothing is written then.
    """
    folder = Path(folder)
    page, pictures = rendered(report, str(folder / "report.json"))
    for name, data in pictures.items():
        write_bytes(folder / name, data)
    write_text(folder / "report.html", page)
    return folder / "report.html"
