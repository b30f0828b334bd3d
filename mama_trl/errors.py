"""What a user is meant to read: the one exception, values that fit into a sentence, and warnings that are said once."""

import logging
import reprlib
from functools import lru_cache

LIMIT = 290  # characters of a sentence, so that `mama: ` before it fits into 300
_REASON = 100  # of them for what another library says, so that names of files beside it stay whole
_LEAST_WORD = 40  # a long name is shortened to no less


class MamaError(ValueError):
    """Bad input, said in one sentence that names the field, the value and the mend.

    The command line prints it without a traceback and ends with exit code 2. Whatever went into the sentence (a path of
    thousands of characters, another library's report, escape sequences), it is one printable line below 300 characters.
    """

    def __init__(self, message: object = ""):
        super().__init__(one_line(str(message)))


def one_line(text: str, limit: int = LIMIT) -> str:
    """`text` as one printable line of at most `limit` characters: its longest words are cut in their middle first."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else f"\\x{ord(c):02x}" for c in text).strip()
    if len(text) <= limit:
        return text
    words = text.split(" ")
    while (excess := sum(map(len, words)) + len(words) - 1 - limit) > 0:
        longest = max(range(len(words)), key=lambda i: len(words[i]))
        size = max(_LEAST_WORD, len(words[longest]) - excess)
        if len(words[longest]) <= size:
            return " ".join(words)[: limit - 1] + "…"
        head = (size - 1) // 2
        words[longest] = words[longest][:head] + "…" + words[longest][len(words[longest]) - (size - 1 - head) :]
    return " ".join(words)


class _Repr(reprlib.Repr):
    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxset, self.maxdict = 2, 4, 4, 4, 4
        self.maxstring = self.maxother = self.maxlong = 60

    def repr1(self, x, level):
        try:
            return super().repr1(x, level)
        except Exception:  # an object's own __repr__, or a number of more digits than Python writes
            return f"a {type(x).__name__}"


def shown(value: object) -> str:
    """`repr(value)`, cut to some 60 characters and without its depths: what a sentence says of a value."""
    return _Repr().repr(value)


@lru_cache(maxsize=None)
def warn_once(logger: logging.Logger, message: str) -> None:
    """Logs a warning that is worth saying, and not worth saying at every mask update or layer."""
    logger.warning(message)


def root_of(error: BaseException) -> str:
    """The first line of what led to an exception in the first place."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of what an exception says, or its name: another library's error within a sentence of ours."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] += f" {lines[1]}"
    return one_line(lines[0], _REASON).rstrip(".") if lines else type(error).__name__
