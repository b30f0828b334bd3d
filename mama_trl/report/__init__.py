"""report.html and PNG plots from a run's JSON."""

from .html import write_report

__all__ = ["write_report"]
