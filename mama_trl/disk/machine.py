"""What the machine refuses (no space, no memory, a folder that is gone), said in one sentence wherever it shows."""

import errno
import os
import re
from typing import Iterator, Optional

from ..errors import first_line

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FULL_TEXT = re.compile(  # safetensors (Rust) and torch have errors of their own
    r"os error (28|122|27)\b|No space left on device|File too large|Disk quota exceeded|PytorchStreamWriter failed|"
    r"unexpected pos \d+ vs \d+|file write failed"
)
_MEMORY_TEXT = re.compile(r"can't allocate memory|out of memory|Cannot allocate memory")


def physical_memory() -> int:
    """Bytes of memory that this machine has."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Bytes of memory that programs could have now, files that the system keeps in memory given up."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not Linux
        return physical_memory()


def refusal_of(error: BaseException) -> Optional[str]:
    """A sentence for what the machine refused; None if it was something else."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in _FULL or _FULL_TEXT.search(str(cause)):
            where = f" ({cause.filename})" if getattr(cause, "filename", None) else ""
            return (
                f"the disk is full{where}: free some space and call the same command again, a training command with "
                "--resume_from_checkpoint true."
            )
        if isinstance(cause, MemoryError) or isinstance(cause, RuntimeError) and _MEMORY_TEXT.search(str(cause)):
            return "there is not enough memory: use a smaller batch, shorter sequences or a smaller model."
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename} is gone: it was removed or renamed while the command was running; call it again."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used: {error.strerror or first_line(error)}; choose another place."
    if isinstance(error, OSError):  # a working folder that is gone, a network that is not there
        return f"the system refuses: {first_line(error)}; mend that and call the same command again."
    return None


def _chain(error: Optional[BaseException]) -> Iterator[BaseException]:
    """An exception and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
