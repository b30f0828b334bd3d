"""What a user is meant to read: the one exception, and warnings that are said once."""

import logging
from functools import lru_cache


class MamaError(ValueError):
    """Bad input, said in one sentence that names the field, the value and the mend.

    The command line prints it without a traceback and ends with exit code 2.
    """


@lru_cache(maxsize=None)
def warn_once(logger: logging.Logger, message: str) -> None:
    """Logs a warning that is worth saying, and not worth saying at every mask update or layer."""
    logger.warning(message)


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
