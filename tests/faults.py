"""What the tests of faults share: one sentence instead of a traceback, and nothing changed on disk."""

import hashlib
from contextlib import contextmanager
from pathlib import Path

import pytest

from mama_trl.cli import main
from mama_trl.errors import MamaError

LONGEST = 300


class Reached(Exception):
    """The checks are through, and compute would begin."""


def sentence_of(error: MamaError) -> str:
    """The sentence of a refusal, which is one line that fits."""
    said = str(error)
    assert 10 < len(said) < LONGEST and said.isprintable(), said
    return said


def refused(capsys, *argv) -> str:
    """Runs `mama argv`, which must fail with exit code 2 and one sentence on stderr; returns that line."""
    assert main([str(item) for item in argv]) == 2
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("mama: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    assert len(lines[0]) < LONGEST, lines[0]
    return lines[0]


def tree(folder: Path) -> dict[str, str]:
    """Everything beneath a folder: links by their targets, files by a hash of their contents."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@contextmanager
def unchanged(folder: Path):
    """Fails if anything beneath `folder` is another afterwards."""
    before = tree(folder)
    yield
    after = tree(folder)
    assert after == before, sorted(set(before.items()) ^ set(after.items()))


@contextmanager
def refusal(match: str = ""):
    """Within it a `MamaError` of one sentence is raised."""
    with pytest.raises(MamaError, match=match) as caught:
        yield
    sentence_of(caught.value)
