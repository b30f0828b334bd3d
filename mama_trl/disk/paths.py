"""Names of files and folders: what is there, and that no output is, holds or lies within what is read."""

import fnmatch
import os
from pathlib import Path
from typing import Iterable, Mapping, Union

from ..errors import MamaError, shown

Name = Union[str, Path, None]


def is_file(name: Name) -> bool:
    return _ask(os.path.isfile, name)


def is_dir(name: Name) -> bool:
    return _ask(os.path.isdir, name)


def exists(name: Name) -> bool:
    return _ask(os.path.lexists, name)


def expanded(name: Union[str, Path]) -> Path:
    """A name with its `~` resolved. Raises `MamaError` if it is the home of nobody."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise MamaError(f"{shown(str(name))} lies in the home folder of nobody here: give a folder there is.") from None


def _ask(question, name: Name) -> bool:
    """False also for what no file can have as its name: too long, empty, with NUL, a number."""
    try:
        return bool(name) and question(os.path.expanduser(name))
    except (OSError, ValueError, TypeError):
        return False


def check_paths(outputs: Iterable[Name], inputs: Mapping[str, Name], beside: Iterable[str] = ()) -> None:
    """Refuses to write over what is read: links resolved, no output is an input, lies in it or holds it.

    Args:
        inputs: names of files and folders that are read, by what they are ("the model"); what is no file or folder here
            (a hub id, None) is passed over.
        beside: which of them may lie in an output folder, such as "the recipe" or "the checkpoint".

    Raises:
        MamaError: naming both.
    """
    there = {what: name for what, name in inputs.items() if exists(name)}
    may_lie_within = {_real(there[what]) for what in beside if what in there}
    for output in (name for name in outputs if name):
        for what, given in there.items():
            out, read = _real(output), _real(given)
            if out == read or _same_file(output, given):
                own = "folder" if is_dir(given) else "file"
                raise MamaError(f"{output} is {what}'s own {own}, which would be lost: give another output.")
            if read in out.parents:
                raise MamaError(f"{output} lies within {what}, {given}, which is only read: give an output outside it.")
            if out in read.parents and read not in may_lie_within:
                raise MamaError(f"{output} holds {what}, {given}, which is only read: give another output.")


def _real(name: Union[str, Path]) -> Path:
    return Path(os.path.realpath(os.path.expanduser(name)))


def _same_file(one: Union[str, Path], other: Union[str, Path]) -> bool:
    """Also by another name of the same file (a hard link)."""
    try:
        return os.path.samefile(os.path.expanduser(one), os.path.expanduser(other))
    except (OSError, ValueError):
        return False


def check_not_written(name: Name, written: Iterable[str], output: Name) -> None:
    """Refuses an input that lies in the output folder under a name (a shell pattern) that will be written there."""
    if not exists(name) or not exists(output):
        return
    read = _real(name)
    if read.parent == _real(output) and any(fnmatch.fnmatchcase(read.name, pattern) for pattern in written):
        raise MamaError(f"{name} has the name of a file that is written into {output}: move it or rename it.")
