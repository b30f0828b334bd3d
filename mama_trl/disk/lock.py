"""One run at a time in an output folder: a lock that ends with the process, however it ends."""

import fcntl
import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

from ..errors import MamaError, first_line
from .folders import LOCK

logger = logging.getLogger(__name__)
_held: set[int] = set()


def _let_go() -> None:
    """A child of this process (a data loader's worker) must not hold the lock when this one is dead."""
    while _held:
        _close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Holds `folder` for this process; creates it, and takes it away again if nothing has come into it.

    The lock is the system's (`flock`): a crash or SIGKILL releases it, and a file that such a run leaves behind holds
    nothing. Where the file system has no locks, this is said once and the run goes on without.

    Raises:
        MamaError: another run holds the folder.
    """
    folder = Path(folder)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _take(folder)
    except OSError as error:
        raise MamaError(f"{folder} cannot be written: {first_line(error)}.") from None
    try:
        yield
    finally:
        if handle is not None:
            _leave(folder, handle)
        for path in created:
            try:
                path.rmdir()
            except OSError:
                break  # something has come into it


def _take(folder: Path) -> int | None:
    """The open lock file; None where there are no locks."""
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise MamaError(
                f"another run is writing into {folder}: wait until it has ended, or choose another output folder."
            ) from None
        except OSError as error:
            os.close(handle)
            path.unlink(missing_ok=True)
            logger.warning(
                "%s lies on a file system without locks (%s): see to it that no other run writes there.", folder,
                first_line(error),
            )
            return None
        try:
            if os.stat(path).st_ino == os.fstat(handle).st_ino:
                _held.add(handle)
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # the run that had it before took its file away just now: again, with a new one


def _leave(folder: Path, handle: int) -> None:
    try:
        if os.stat(folder / LOCK).st_ino == os.fstat(handle).st_ino:
            os.unlink(folder / LOCK)
    except OSError:
        pass  # the folder has been moved or deleted meanwhile
    _close(handle)


def _close(handle: int) -> None:
    _held.discard(handle)
    try:
        os.close(handle)
    except OSError:
        pass
