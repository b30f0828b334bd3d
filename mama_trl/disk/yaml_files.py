"""Reads a YAML file of settings: one mapping, in which every value means what it looks like.

YAML 1.1, which PyYAML reads, takes `2:4` for the number 124, `no` for false and `1e-3` for text. Here only `true`,
`false`, `null`, decimal numbers and numbers with an exponent are more than text.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from ..errors import MamaError, first_line, one_line

_MOST_VALUES = 100_000  # beyond it, references to references have grown without end
_DEEPEST = 50


class _Loader(yaml.SafeLoader):
    """`yaml.SafeLoader` with the types of YAML 1.2's core, and no name twice in a mapping."""

    yaml_implicit_resolvers: dict = {}

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


for _tag, _expression, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+.0123456789"),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_expression})$"), list(_first))


def _construct_int(loader, node):
    return int(loader.construct_scalar(node).replace("_", ""))


def _construct_float(loader, node):
    text = loader.construct_scalar(node).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def read_settings(path: str | Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file; `what` names the file in sentences, such as "--config x.yaml".

    Raises:
        MamaError: not readable, no UTF-8, no valid YAML, more than one document, or no mapping of names.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MamaError(f"{what} cannot be read: {first_line(error)}.") from None
    try:
        settings = yaml.load(text, _Loader)  # a SafeLoader: no Python objects
        _check_extent(settings)
    except yaml.YAMLError as error:
        raise MamaError(f"{what} is no valid YAML: {one_line(' '.join(str(error).split()), 200)}.") from None
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        raise MamaError(f"{what} is no valid YAML: {first_line(error)}.") from None
    if not isinstance(settings, dict):
        raise MamaError(f"{what} holds no `name: value` lines.")
    for name in settings:
        if not isinstance(name, str):
            raise MamaError(f"{what} has {name!r} where the name of a setting is meant: write `name: value`.")
    return settings


def _check_extent(settings: Any) -> None:
    """Raises `ValueError` for values within themselves, or that references have multiplied."""
    waiting, count = [(settings, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if depth > _DEEPEST or count > _MOST_VALUES:
            raise ValueError("its values lie too deep in one another, or are too many")
        if isinstance(value, dict):
            waiting += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, (list, tuple)):
            waiting += [(item, depth + 1) for item in value]
