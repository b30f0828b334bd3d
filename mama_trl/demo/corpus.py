"""Real text on every machine: the sources and docstrings of the running Python's standard library."""

import hashlib
import platform
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Tests, bundled third parties and files that are mostly generated tables are no good text.
SKIPPED = {
    "test", "tests", "idlelib", "site-packages", "dist-packages", "lib2to3", "encodings", "pydoc_data", "turtledemo",
}


@dataclass(frozen=True)
class Corpus:
    """Texts of whole files; no file is in both parts. `sha256` is over names and contents of all of them."""

    source: str
    train: list[str]
    heldout: list[str]
    sha256: str

    @property
    def facts(self) -> dict:
        return {
            "source": self.source,
            "sha256": self.sha256,
            "files_train": len(self.train),
            "files_heldout": len(self.heldout),
            "characters": sum(map(len, self.train)) + sum(map(len, self.heldout)),
        }


def standard_library(seed: int = 0, heldout_share: float = 0.1, max_characters: int = 8_000_000) -> Corpus:
    """Reads the standard library and splits it by file.

    Args:
        seed: of the split.
        heldout_share: share of the files that training never sees.
        max_characters: files are taken in a shuffled order until this is reached.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))
    random.Random(seed).shuffle(files)
    texts, total, sha = [], 0, hashlib.sha256()
    for path in files:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if not 500 <= len(text) <= 200_000 or not text.isascii():
            continue
        texts.append(text)
        sha.update(str(path.relative_to(root)).encode() + b"\0" + text.encode())
        total += len(text)
        if total >= max_characters:
            break
    heldout = max(1, round(len(texts) * heldout_share))
    return Corpus(
        f"Python standard library {platform.python_version()}", texts[heldout:], texts[:heldout], sha.hexdigest()
    )
