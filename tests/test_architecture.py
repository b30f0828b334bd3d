"""docs/architecture.md is true: the tree, the order of its rooms, and the calls that it counts."""

import re
import sys
from pathlib import Path

from mama_trl import MamaConfig
from mama_trl.solvers import mama

from .helpers import train
from .test_imports import ROOMS

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TREE = PAGE.split("## The rooms")[1].split("```")[1]


def test_the_tree_names_every_module():
    rooms = dict(re.findall(r"^(\w+)/((?:.*\n(?!\w))*.*)", TREE, re.MULTILINE))
    for path in (ROOT / "mama_trl").rglob("*.py"):
        room, *rest = path.relative_to(ROOT / "mama_trl").with_suffix("").parts
        if rest[-1:] == ["__init__"] or room == "__init__":
            continue
        if not rest:
            assert re.search(rf"^{room}\.py\b", TREE, re.MULTILINE), f"{room}.py is missing in docs/architecture.md"
        elif len(rest) == 1 or rest[0] == "structures":
            assert re.search(rf"\b{rest[-1]}\b", rooms[room]), f"{room}/: {rest[-1]} is missing in docs/architecture.md"


def test_rooms_stand_in_the_order_that_imports_keep():
    assert tuple(re.findall(r"^(\w+)(?:/|\.py)", TREE, re.MULTILINE)) == ROOMS


def test_four_calls_lead_from_a_mask_update_to_the_kept_connections(make_model, rows, tmp_path, monkeypatch):
    chosen, calls = mama.matrix_mask, []

    def watched(*args, **kwargs):
        if not calls:
            frame = sys._getframe(1)
            while frame.f_code.co_name != "update_masks":
                calls.append(frame.f_code.co_qualname)
                frame = frame.f_back
        return chosen(*args, **kwargs)

    monkeypatch.setattr(mama, "matrix_mask", watched)
    train(make_model("llama"), rows, tmp_path, MamaConfig(sparsity=0.5, mask_start=2), max_steps=2)
    assert calls[::-1] == ["prune", "_Sweep.solve", "solve_mama", "mama"]
    assert not any("<locals>" in name for name in calls)
