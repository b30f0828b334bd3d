"""Who may import whom: the rooms' order, kept by reading the imports. Each failure names the offending line."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mama_trl"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the top of the house to its ground: a room may import those behind it, never those before it.
ROOMS = (
    "cli", "scripts", "demo", "compare", "report", "training", "export", "evaluation", "pruning", "calibration",
    "solvers", "indicators", "selection", "masks", "model", "engines", "disk", "config", "fields", "errors",
)
GROUND = ("errors", "fields", "config", "disk")
ALLOWED = {
    "report": {"report", "errors"},
    "solvers": {"solvers", "indicators", "selection", "errors"},
    "export": {"export", "masks", "model", "engines", *GROUND},
    "evaluation": {"evaluation", "masks", "model", "engines", *GROUND},
}
ENGINE_WORDS = ("deepspeed", "fsdp", "dtensor", "zero3", "zero2", "zero1")


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str, str]]:
    """(line, imported room, imported module) of every import of ours, also inside functions."""
    package = ["mama_trl", *path.relative_to(PACKAGE).with_suffix("").parts[:-1]]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names = [".".join([*base, *([node.module] if node.module else [])])]
            if names[0] == "mama_trl" or (node.level and not node.module):  # from . import module
                names = [f"{names[0]}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "mama_trl" and len(parts) > 1 and parts[1] != "__version__":
                found.append((node.lineno, parts[1], name))
    return found


@pytest.mark.parametrize("path", [path for path in FILES if path.parent != PACKAGE], ids=lambda p: str(p.name))
def test_imports_point_one_way(path):
    room = room_of(path)
    for line, imported, _ in imports(path):
        where = f"{path.relative_to(PACKAGE.parent)}:{line}: {room} imports {imported}"
        assert imported in ROOMS, f"{where}, which is no room: name it in ROOMS"
        assert ROOMS.index(imported) >= ROOMS.index(room), f"{where}, which stands above it"
        assert imported in ALLOWED.get(room, ROOMS), f"{where}: it may only import {sorted(ALLOWED[room])}"


@pytest.mark.parametrize("path", [path for path in FILES if room_of(path) in GROUND], ids=lambda path: path.name)
def test_the_ground_floor_knows_no_room(path):
    for line, imported, _ in imports(path):
        assert imported in GROUND, f"{path.relative_to(PACKAGE.parent)}:{line}: imports {imported}"


def test_solvers_see_tensors_only():
    for path in (PACKAGE / "solvers").glob("*.py"):
        for line, imported, module in imports(path):
            assert module.rpartition(".")[2] not in ("source", "trajectory", "recorded", "calibration_gradients"), (
                f"{path.name}:{line}: a solver imports {module}, which knows models"
            )
        names = {node.id: node.lineno for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        for name in ("Target", "Shard", "nn"):
            assert name not in names, f"{path.name}:{names.get(name)}: a solver names {name}"


def test_only_engines_name_engines():
    """In code: help texts, docstrings and names of config files may speak of them."""
    for path in FILES:
        if room_of(path) == "engines":
            continue
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.NAME:
                for word in ENGINE_WORDS:
                    assert word not in token.string.lower(), (
                        f"{path.relative_to(PACKAGE.parent)}:{token.start[0]}: {token.string} belongs in engines/"
                    )


def test_there_is_no_circle():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        name = ".".join(["mama_trl", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
        graph[name] = {module for _, _, module in imports(path)}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name):], name])
        if name in done or name not in graph:
            return
        for other in graph[name]:
            visit(other, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())
