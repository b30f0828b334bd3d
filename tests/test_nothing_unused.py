"""Nothing that only tests call: a function that the package, its benchmarks and its pages do not use is no part of it."""

import ast
import io
import re
import tokenize
from pathlib import Path

from mama_trl import __all__ as exported

ROOT = Path(__file__).resolve().parents[1]
USERS = [path for folder in ("mama_trl", "benchmarks", "examples", "train") for path in (ROOT / folder).rglob("*.py")]
PAGES = "".join(path.read_text(encoding="utf-8") for path in [ROOT / "README.md", ROOT / "docs" / "extend.md"])
# Reference forms that belong into tests/reference.py, once no other branch is at work in solvers/redistribution.py.
WAITING = {"least_squares", "layer_error"}


def test_every_function_has_a_user():
    defined: dict[str, str] = {}
    used: dict[str, int] = {}
    for path in USERS:
        text = path.read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME:
                used[token.string] = used.get(token.string, 0) + 1
        if path.is_relative_to(ROOT / "mama_trl"):
            for node in ast.parse(text).body:
                if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("__"):
                    defined[node.name] = f"{path.relative_to(ROOT)}:{node.lineno}"
    for name, where in defined.items():
        elsewhere = name in exported or re.search(rf"\b{name}\b", PAGES)
        assert used[name] > 1 or elsewhere or name in WAITING, (
            f"{where}: nothing but tests uses {name}: wire it in, or move it into tests/reference.py"
        )
