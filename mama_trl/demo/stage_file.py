"""`stage.json`: what a finished stage found out, and which files it left, so that damage to either is noticed."""

import json
import logging
import zlib
from pathlib import Path
from typing import Any, Optional

from ..disk.writing import write_json
from .names import STAGE_FILE

logger = logging.getLogger(__name__)
# What the report and later stages read of each stage.
FACTS = {
    "data": ("corpus", "task"), "pretrain": (), "sft": ("perplexity", "accuracy"),
    "grpo": ("perplexity", "accuracy", "sparsity_history", "reward"),
    "distill": ("perplexity", "accuracy", "loss", "sparsity", "bytes_packed", "by_matrix"),
    "baselines": ("results", "loss"),
}
_CHUNK = 1 << 22


def write_stage(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Writes `folder/stage.json` with the sizes and checksums of all files that lie in `folder`; returns its facts."""
    files = {
        str(path.relative_to(folder)): [path.stat().st_size, checksum(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and not path.name.endswith(".tmp")
    }
    stored = json.loads(json.dumps({**facts, "files": files}))
    write_json(folder / STAGE_FILE, {**stored, "checksum": _of(stored)})
    return stored


def read_stage(folder: Path, stage: str) -> Optional[dict[str, Any]]:
    """The facts of a finished stage; None if it is not finished, or (which is logged) damaged."""
    path = folder / STAGE_FILE
    if not path.is_file():
        return None
    damage = None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        total = stored.pop("checksum", None)
        checked = total is not None or "files" in stored  # an earlier version wrote neither
        if checked and total != _of(stored) or stored["name"] != stage:
            damage = path
        elif any(name not in stored for name in ("seconds", "steps", "tokens", *FACTS[stage])):
            damage = path
        else:
            damage = _damaged(folder, stored.get("files", {}))
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError):
        damage = path
    if damage is not None:
        logger.warning("%s is damaged: the stage %s, and what rests on it, is done again.", damage, stage)
        return None
    return stored


def _damaged(folder: Path, files: dict[str, list[int]]) -> Optional[Path]:
    """The first file that is not what it was."""
    for name, (size, total) in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or checksum(path) != total:
            return path
    return None


def checksum(path: Path) -> int:
    """CRC-32 of a file's contents."""
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total


def _of(stored: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(stored, sort_keys=True).encode())
