"""Checks settings against the types and ranges that their dataclass declares. Knows nothing of what they mean.

A range stands in the annotation, where no argument parser trips over it:

    budget_blend: Annotated[float, Range(0, 1)] = 0.3

Values come from Python as they are meant, or as words (YAML, a command line), where `"false"` and `"1e-3"` are read.
"""

import math
import types
from dataclasses import MISSING, Field, dataclass, fields
from enum import Enum
from functools import lru_cache
from numbers import Integral, Real
from os import PathLike
from typing import Annotated, Any, Literal, Mapping, Union, get_args, get_origin, get_type_hints

from .errors import MamaError, shown

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
LARGEST = 2**63 - 1  # whole numbers beyond it fit into no tensor


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both included unless `above` or `below` says otherwise."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        return (value > self.low if self.above else value >= self.low) and (
            value < self.high if self.below else value <= self.high
        )

    def __str__(self) -> str:
        low = "" if self.low == -math.inf else f"{'above' if self.above else 'of at least'} {_written(self.low)}"
        high = "" if self.high >= LARGEST else f"{'below' if self.below else 'at most'} {_written(self.high)}"
        return " and ".join(part for part in (low, high) if part)


def _written(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else f"{bound:g}"


@dataclass(frozen=True)
class Choices:
    """The texts that a field knows."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"one of {', '.join(self.names[:8])}{' (or others)' if len(self.names) > 8 else ''}"


Share = Annotated[float, Range(0, 1)]
Count = Annotated[int, Range(1)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


class _Unfit(Exception):
    """What would have been right."""


def check_value(name: str, value: Any, hint: Any, words: bool = False, where: str = "") -> Any:
    """`value` as the annotation `hint` wants it: 1 as 1.0, one text as a list of one, with `words` "no" as False.

    Args:
        name: of the setting; `where` stands before it in the sentence, such as "recipe.yaml, section data, ".

    Raises:
        MamaError: another type, NaN or infinity, or outside the annotation's `Range`.
    """
    try:
        return _fit(value, hint, words)
    except _Unfit as right:
        raise MamaError(f"{where}`{name}` is {shown(value)}: use {right}.") from None


def check_fields(instance: Any, cls: type, ranges: Mapping[str, Range] = types.MappingProxyType({})) -> None:
    """Checks, and sets right, the attributes of `instance` that `cls` declares as fields.

    A field that has its default is taken as it is: other people's defaults do not always fit their annotations.

    Args:
        ranges: further ones by field name, for classes whose annotations have none.
    """
    for declared in fields(cls):
        value = getattr(instance, declared.name, MISSING)
        if declared.init and value is not MISSING and not _is_default(declared, value):
            new = check_value(declared.name, value, declared_hint(cls, declared, ranges))
            if new is not value:
                object.__setattr__(instance, declared.name, new)


def check_mapping(
    values: Any, cls: type, where: str, ranges: Mapping[str, Range] = types.MappingProxyType({})
) -> dict[str, Any]:
    """The settings of a YAML section as keyword arguments of `cls`; `where` names the section.

    Raises:
        MamaError: no mapping, a name that `cls` does not have, or a value that does not fit its field.
    """
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise MamaError(f"{where} is {shown(values)}: write one `name: value` a line.")
    known = {declared.name: declared for declared in fields(cls) if declared.init}
    found = {}
    for name, value in values.items():
        if name not in known:
            raise MamaError(f"{where} has the unknown key {shown(name)}.{nearest(str(name), known)}")
        found[name] = value
        if not _is_default(known[name], value):
            found[name] = check_value(name, value, declared_hint(cls, known[name], ranges), True, f"{where}, ")
    return found


def nearest(name: str, known) -> str:
    """`" Did you mean x?"`, or nothing."""
    import difflib

    near = difflib.get_close_matches(name[:100], list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


@lru_cache(maxsize=None)
def hints_of(cls: type) -> dict[str, Any]:
    """Annotations by field name, with their ranges."""
    return get_type_hints(cls, include_extras=True)


def declared_hint(cls: type, declared: Field, ranges: Mapping[str, Range]) -> Any:
    """The annotation of a field with the range that `ranges`, and the choices that its metadata, have for it."""
    hint, choices = hints_of(cls)[declared.name], declared.metadata.get("choices")
    if choices and all(isinstance(choice, str) for choice in choices):
        hint = Annotated[hint, Choices(tuple(choices))]
    return Annotated[hint, ranges[declared.name]] if declared.name in ranges else hint


def _is_default(declared: Field, value: Any) -> bool:
    default = declared.default_factory() if declared.default_factory is not MISSING else declared.default
    if isinstance(value, float) and value != value:
        return False
    try:
        if value is None and default == "":  # what argparse makes of an empty default
            return True
        return value is default or (type(value) is type(default) and bool(value == default))
    except Exception:  # a value that cannot be compared is none of the defaults
        return False


def _fit(value: Any, hint: Any, words: bool) -> Any:
    """`value` as `hint` wants it; raises `_Unfit`."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *rules = get_args(hint)
        return _within(_described(value, inner, words, rules), rules, inner)
    if hint is Any:
        return value
    if hint is None or hint is type(None):
        if value is None:
            return None
        raise _Unfit("nothing")
    if origin in (Union, types.UnionType):
        return _fit_one_of(value, get_args(hint), words)
    if origin is Literal:
        return _fit_literal(value, get_args(hint))
    if origin in (list, set, tuple) or hint in (list, tuple):
        return _fit_list(value, (get_args(hint) or (Any,))[0], words)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _fit_enum(value, hint)
    if hint is bool:
        return _fit_bool(value, words)
    if hint is int:
        return _fit_int(value, words)
    if hint is float:
        return _fit_float(value, words)
    if hint is str:
        return _fit_text(value)
    if hint is dict or origin is dict:
        if isinstance(value, Mapping):
            return value
        raise _Unfit("a mapping of names to values")
    if isinstance(hint, type) and not isinstance(value, hint):
        raise _Unfit(f"a {hint.__name__}")
    return value


def _described(value: Any, inner: Any, words: bool, rules: list) -> Any:
    try:
        return _fit(value, inner, words)
    except _Unfit as right:
        choices = [str(rule) for rule in rules if isinstance(rule, Choices)]
        ranges = [str(rule) for rule in rules if isinstance(rule, Range)]
        raise _Unfit(choices[0] if choices else " ".join([str(right), *ranges])) from None


def _within(value: Any, rules: list, inner: Any) -> Any:
    for rule in rules:
        if isinstance(rule, Choices) and isinstance(value, str) and value not in rule.names:
            raise _Unfit(str(rule))
        if isinstance(rule, Range) and isinstance(value, Real) and not isinstance(value, bool):
            if not rule.holds(value):
                raise _Unfit(f"{'a whole number' if _whole(inner) else 'a number'} {rule}")
    return value


def _whole(hint: Any) -> bool:
    """Whether every number that `hint` allows is a whole one."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return int in parts and float not in parts


def _fit_one_of(value: Any, hints: tuple, words: bool) -> Any:
    if value is None and type(None) in hints:
        return None
    if any(isinstance(hint, type) and issubclass(hint, Enum) for hint in hints):
        hints = tuple(hint for hint in hints if hint is not str)  # any text would do, and fail later
    rights = []
    for as_words in (False, True) if words else (False,):
        rights = []
        for hint in hints:
            try:
                return _fit(value, hint, as_words)
            except _Unfit as right:
                if hint is not type(None):
                    rights.append(str(right))
    raise _Unfit(" or ".join(dict.fromkeys(rights)))


def _fit_literal(value: Any, choices: tuple) -> Any:
    for choice in choices:
        if type(value) is type(choice) and value == choice:
            return value
    raise _Unfit("one of " + ", ".join(map(str, choices)))


def _fit_enum(value: Any, hint: type[Enum]) -> Any:
    names = [str(member.value) for member in hint]
    if isinstance(value, hint) or isinstance(value, str) and value in names:
        return value
    raise _Unfit(str(Choices(tuple(names))))


def _fit_list(value: Any, hint: Any, words: bool) -> list:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise _Unfit("a list" + (" of texts, such as [a, b]" if hint is str else ""))
    return [_fit(item, hint, words) for item in value]


def _fit_bool(value: Any, words: bool) -> bool:
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool_", "bool") and type(value).__module__ == "numpy":
        return bool(value)
    if words and isinstance(value, str) and value.strip().lower() in WORDS:
        return WORDS[value.strip().lower()]
    raise _Unfit("true or false")


def _fit_int(value: Any, words: bool) -> int:
    if words and isinstance(value, str):
        value = _number(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(_float(value)):
        raise _Unfit("a whole number")
    if not isinstance(value, Integral) and float(value) != math.floor(value):
        raise _Unfit("a whole number")
    if not -LARGEST <= int(value) <= LARGEST:
        raise _Unfit("a whole number below 2**63")
    return int(value)


def _fit_float(value: Any, words: bool) -> float:
    if words and isinstance(value, str):
        value = _number(value)
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(_float(value)):
        raise _Unfit("a finite number")
    return _float(value)


def _float(value: Real) -> float:
    try:
        return float(value)
    except (OverflowError, ValueError, TypeError):
        return math.nan


def _number(text: str) -> Any:
    """The number that a word stands for, whole where it is written so; the word itself where it is none."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _fit_text(value: Any) -> Any:
    if isinstance(value, PathLike) and isinstance(value.__fspath__(), str):
        return value
    if not isinstance(value, str):
        raise _Unfit("text (in quotes)" if isinstance(value, Real) else "text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Unfit("text without lone surrogates") from None
    if "\0" in value:
        raise _Unfit("text without NUL characters")
    return value
