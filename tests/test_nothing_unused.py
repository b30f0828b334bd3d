"""Nothing that only tests call: what package, benchmarks and pages do not use is no part of the package."""

import ast
import re
from pathlib import Path

from mama_trl import __all__ as exported

ROOT = Path(__file__).resolve().parents[1]
USERS = [path for folder in ("mama_trl", "benchmarks", "examples", "train") for path in (ROOT / folder).rglob("*.py")]
PAGES = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", ROOT / "docs" / "extend.md"])


def test_every_function_has_a_user():
    defined: dict[str, str] = {}
    used: set[str] = set()
    for path in USERS:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            name = getattr(node, "id", getattr(node, "attr", None))
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else [name]
            used.update(name for name in names if name)
        if path.is_relative_to(ROOT / "mama_trl"):
            for node in tree.body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("__"):
                    defined[node.name] = f"{path.relative_to(ROOT)}:{node.lineno}"
    for name, where in defined.items():
        elsewhere = name in exported or re.search(rf"\b{name}\b", PAGES)
        assert name in used or elsewhere, (
            f"{where}: nothing but tests uses {name}: wire it in, or move it into tests/reference.py"
        )
