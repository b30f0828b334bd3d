"""Whether report.json holds what the page is drawn from: types and ranges, before a picture is drawn."""

import math
from typing import Any, Callable, Optional

from ..errors import MamaError, shown

# A check gives None, or where in the value something is wrong and what it is.
Check = Callable[[Any], Optional[tuple[str, Any]]]
_MOST = 1_000_000  # points of a curve, rows of a table


def check_report(report: Any, where: str) -> None:
    """Raises `MamaError` naming the first entry that is missing or of another kind; `where` names the file."""
    wrong = _REPORT(report)
    if wrong is not None:
        place, value = wrong
        name = f"`{place.lstrip('.')}`" if place else "the report"
        raise MamaError(f"{where} is damaged, since {name} is {_said(value)}: restore it, or run `mama run` again.")


class _Missing:
    pass


def _said(value: Any) -> str:
    return "missing" if isinstance(value, _Missing) else shown(value)


def _number(low: float = -1e300, high: float = 1e300, broken: bool = False, whole: bool = False) -> Check:
    """A number in a range; with `broken` also NaN and infinity, which a broken model's measures are."""

    def check(value: Any) -> Optional[tuple[str, Any]]:
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            return "", value
        return None if low <= value <= high or broken and not math.isfinite(value) else ("", value)

    return check


def _text(value: Any) -> Optional[tuple[str, Any]]:
    return None if isinstance(value, str) and _encodes(value) else ("", value)


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> Optional[tuple[str, Any]]:
    """Text or a number, which is shown as it is."""
    return None if isinstance(value, (int, float)) or _text(value) is None else ("", value)


def _or_none(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _list(item: Check, length: Optional[int] = None) -> Check:
    def check(value: Any) -> Optional[tuple[str, Any]]:
        if not isinstance(value, list) or len(value) > _MOST or length is not None and len(value) != length:
            return "", value
        for index, each in enumerate(value):
            wrong = item(each)
            if wrong is not None:
                return f"[{index}]{wrong[0]}", wrong[1]
        return None

    return check


def _mapping(needed: dict[str, Check], others: dict[str, Check] = {}, rest: Optional[Check] = None) -> Check:
    """A mapping with all of `needed`, those of `others` that it has, and everything else as `rest`, if given."""

    def check(value: Any) -> Optional[tuple[str, Any]]:
        if not isinstance(value, dict):
            return "", value
        for name in needed:
            if name not in value:
                return f".{name}", _Missing()
        for name, each in value.items():
            part = needed.get(name) or others.get(name) or rest
            wrong = part(each) if part is not None else None
            if wrong is not None:
                return f".{name}{wrong[0]}", wrong[1]
        return None

    return check


def _trajectory(value: Any) -> Optional[tuple[str, Any]]:
    """Curves of one length, and where the stages begin."""
    if not isinstance(value, dict) or not isinstance(value.get("steps"), list):
        return ".steps", value.get("steps") if isinstance(value, dict) else value
    curve = _list(_number(0), len(value["steps"]))
    names = [f"{kind}{suffix}" for kind in ("kept", "pruned") for suffix in ("", "_p10", "_p90")]
    stages = _list(lambda pair: _list(_plain, 2)(pair) or _text(pair[0]) or _number(0)(pair[1]))
    return _mapping({"steps": curve, **dict.fromkeys(names, curve), "stages": stages})(value)


def _attribution(value: Any) -> Optional[tuple[str, Any]]:
    """Bin counts, and one edge more than bins."""
    edges = value.get("edges_log10") if isinstance(value, dict) else None
    if not isinstance(edges, list) or not 2 <= len(edges) <= 10_000:
        return ".edges_log10", edges
    counts = _list(_number(0), len(edges) - 1)
    return _mapping({"edges_log10": _list(_number(-100, 100)), "kept": counts, "pruned": counts})(value)


_SHARE, _COUNT = _number(0, 1), _number(0, whole=True)
_MEASURED = {"perplexity": _number(broken=True), "accuracy": _SHARE}
_PRUNED = {**_MEASURED, "sparsity": _SHARE}
_SIZES = {"bytes": _or_none(_COUNT), "bytes_packed": _or_none(_COUNT)}
_CURVE = _list(_list(_number(broken=True), 2))
_REPORT = _mapping(
    {"dense": _mapping(_MEASURED, _SIZES), "pruned": _mapping(_PRUNED, _SIZES)},
    {
        "title": _text,
        "labels": _mapping({}, rest=_text),
        "seed": _plain,
        "versions": _mapping({}, rest=_plain),
        "protocol": _mapping({}, {"tokens": _COUNT}, _plain),
        "budgets": _mapping({}, rest=_plain),
        "corpus": _mapping({}, rest=_plain),
        "task": _mapping({}),
        "model": _mapping({"parameters": _COUNT, "prunable": _COUNT}),
        "stages": _list(_mapping({"name": _text, "seconds": _number(0), "steps": _COUNT, "tokens": _COUNT})),
        "samples": _list(_mapping({"prompt": _text, "dense": _text, "pruned": _text})),
        "baselines": _mapping({}, rest=_mapping(dict.fromkeys(("oneshot", "distilled"), _mapping(_PRUNED)))),
        "mama_stages": _mapping({}, rest=_mapping(_MEASURED)),
        "history": _mapping(
            {}, {"sparsity": _CURVE, "reward": _CURVE, "distill_loss": _mapping({}, rest=_CURVE)}
        ),
        "sparsity_by_matrix": _list(
            _mapping({"kind": _text, "sparsity": _SHARE, "block": _or_none(_number(0, 9999, whole=True))})
        ),
        "attribution": _or_none(_attribution),
        "trajectory": _or_none(_trajectory),
    },
)
