"""What belongs to a checkpoint: its files with sizes and cheap hashes, kept in `state.json`, compared on resume."""

import hashlib
import json
from pathlib import Path
from typing import Any, Optional

from ..masks.files import FOLDER, STATE_FILE

# What a resumed run reads: weights, optimizer, scheduler, scaler, random state, masks, statistics, inputs, regime.
_READ = (".safetensors", ".pt", ".pth", ".bin", ".distcp", ".metadata")
_NAMED = ("trainer_state.json", "latest", "config.json")
_NOT_READ = ("training_args.bin",)
_WHOLE = 1 << 28  # bytes of a file up to which all of it is hashed
_SAMPLES, _SAMPLE = 64, 1 << 20  # of a larger one: so many pieces of so many bytes, the first and the last among them


def listing(checkpoint: Path) -> dict[str, list]:
    """[size, hash] of every file of a checkpoint that resuming reads, by its path within."""
    return {str(path.relative_to(checkpoint)): [path.stat().st_size, digest(path)] for path in _files(checkpoint)}


def _files(checkpoint: Path) -> list[Path]:
    def read(path: Path) -> bool:
        inner = path.relative_to(checkpoint)
        if path.name.startswith(".") and path.suffix == ".tmp" or path.name in _NOT_READ or not path.is_file():
            return False
        # Folders within are the engine's own, DeepSpeed's and FSDP's.
        engine = len(inner.parts) > 1 and inner.parts[0] != FOLDER
        return engine or path.suffix in _READ or path.name in _NAMED or path.name.endswith(".index.json")

    return [path for path in sorted(checkpoint.rglob("*")) if read(path)]


def digest(path: Path) -> str:
    """Hash of a file: of all of it, or, beyond 256 MiB, of 64 MiB spread evenly over it."""
    size = path.stat().st_size
    found = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as file:
        if size <= _WHOLE:
            for piece in iter(lambda: file.read(_SAMPLE), b""):
                found.update(piece)
        else:
            for number in range(_SAMPLES):
                file.seek((size - _SAMPLE) * number // (_SAMPLES - 1))
                found.update(file.read(_SAMPLE))
    return found.hexdigest()


def changed(checkpoint: Path, listed: dict[str, list], hashes: bool = True) -> Optional[str]:
    """What is wrong with the first file that is not as it was listed; None if all are. Without `hashes` no file is
    read."""
    for name, (size, _) in listed.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    for name, (_, stored) in listed.items() if hashes else ():
        if digest(checkpoint / name) != stored:
            return f"{name} is not what was written"
    return None


def read_state(folder: Path) -> Optional[dict[str, Any]]:
    """`folder/mama/state.json`; None if it is missing, cut, or not what was written."""
    try:
        stored = json.loads((folder / FOLDER / STATE_FILE).read_text(encoding="utf-8"))
        own = stored.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return stored if own == _checksum(stored) else None


def sealed(state: dict[str, Any]) -> str:
    """The text of `state.json`: `state` with a checksum of itself."""
    state = json.loads(json.dumps(state))
    return json.dumps({**state, "checksum": _checksum(state)}, indent=1)


def _checksum(state: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(state, sort_keys=True).encode(), digest_size=8).hexdigest()
