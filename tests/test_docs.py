"""Pages name files that exist: links, and paths in code or between backticks."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
PATH = r"(?:mama_trl|tests|docs|benchmarks|configs|examples|train)/[\w./-]*\.(?:py|md|yaml|json|png)"
HISTORY = {"CHANGELOG.md", "log.md"}  # speak of what is gone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)", text):
        assert link.startswith("http") or (page.parent / link).exists(), f"{page.name} links to {link}"
    for path in re.findall(PATH, text) if page.name not in HISTORY else []:
        assert (ROOT / path).exists(), f"{page.name} names {path}, which does not exist"
