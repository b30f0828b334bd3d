"""The page, its pictures and its table from a report's JSON."""

import copy
import random
import re

import pytest

from mama_trl.demo.page import write_report
from mama_trl.report.html import headline
from mama_trl.report.plots import PLOTS, number
from mama_trl.report.summary import rows, summary_table


@pytest.fixture
def report():
    random.seed(0)
    names = ("magnitude", "wanda", "sparsegpt")
    result = {
        name: {
            "oneshot": {"sparsity": 0.8, "perplexity": 70.0 + i, "accuracy": 0.1},
            "distilled": {"sparsity": 0.8, "perplexity": 43.0 + i, "accuracy": 0.9},
        }
        for i, name in enumerate(names)
    }
    steps = list(range(0, 100, 10))
    curve = [0.1 + 0.001 * step for step in steps]
    band = {f"{k}{suffix}": curve for k in ("kept", "pruned") for suffix in ("", "_p10", "_p90")}
    return {
        "title": "A run <script>alert(1)</script>",
        "labels": {"wanda": "Wanda", "sparsegpt": "SparseGPT", "mama": "MAMA"},
        "versions": {"python": "3.11"},
        "seed": 3,
        "corpus": {"source": "stdlib", "sha256": "abc123", "files_train": 9, "files_heldout": 1},
        "task": {"description": "sums"},
        "model": {"parameters": 1000, "prunable": 800},
        "protocol": {"sequence_length": 128, "tokens": 4096, "task_prompts": 50},
        "budgets": {"mama": "60 steps of GRPO", "baselines": "none of it"},
        "stages": [{"name": "sft", "seconds": 1.5, "steps": 10, "tokens": 1000}],
        "dense": {"perplexity": 40.0, "accuracy": 0.98, "bytes": 4000000},
        "pruned": {"sparsity": 0.8, "perplexity": 41.5, "accuracy": 0.96, "bytes": 4000000, "bytes_packed": 1300000},
        "baselines": result,
        "mama_stages": {
            "oneshot": {"perplexity": 45.0, "accuracy": 0.9},
            "grpo": {"perplexity": 42.0, "accuracy": 0.95},
        },
        "history": {
            "sparsity": [[1, 0.0], [2, 0.8]], "reward": [[1, 0.9], [2, 0.5]],
            "distill_loss": {"mama": [[1, 0.5], [2, 0.1]], "wanda": [[1, 1.0], [2, 0.4]]},
        },
        "sparsity_by_matrix": [
            {"name": f"{b}.{k}", "block": b, "kind": k, "sparsity": 0.7 + 0.05 * b, "size": 10}
            for b in range(3) for k in ("q_proj", "up_proj")
        ],
        "attribution": {"edges_log10": [-2, -1, 0, 1], "kept": [1, 5, 3], "pruned": [6, 2, 0]},
        "trajectory": {"steps": steps, **band, "stages": [["pretrain", 0], ["sft", 50]]},
        "samples": [{"prompt": "1+1=", "dense": "2", "pruned": "<b>2</b>"}],
    }


def test_the_page_is_one_file_with_every_picture_and_number(report, tmp_path):
    page = write_report(report, tmp_path).read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    assert "<script>alert" not in page and "<b>2</b>" not in page
    for name in PLOTS:
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert page.count("data:image/png;base64,") == len(PLOTS)
    for text in ("41.50", "43.00", "0.960", "1,300,000", "abc123", "60 steps of GRPO", "viewport"):
        assert text in page


@pytest.mark.parametrize("missing", ["history", "attribution", "trajectory", "sparsity_by_matrix", "samples", "corpus"])
def test_missing_parts_leave_a_picture_out(report, tmp_path, missing):
    del report[missing]
    assert write_report(report, tmp_path).stat().st_size > 10000


def test_the_headline_claims_only_what_the_numbers_say(report):
    assert "better than every distilled baseline in both" in headline(report)
    worse = copy.deepcopy(report)
    worse["pruned"]["perplexity"] = 43.5
    assert "in accuracy, but not in perplexity" in headline(worse)
    worse["pruned"]["accuracy"] = 0.5
    assert "not better than every distilled baseline" in headline(worse)


def test_the_table_equals_the_report_and_fits_a_terminal(report):
    from rich.console import Console

    found = {row["model"]: row for row in rows(report)}
    assert found["MAMA, distilled"]["perplexity"] == "41.50" and found["Wanda, one-shot"]["perplexity"] == "71.00"
    console = Console(width=80, record=True, file=open("/dev/null", "w"))
    console.print(summary_table({**report, "title": "short"}))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80 and not any("…" in line for line in lines)


def test_numbers_are_short():
    assert [number(x) for x in (2.151, 456.7, 1234567.0, float("nan"))] == ["2.15", "457", "1.2e+06", "n/a"]
