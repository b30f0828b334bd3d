"""The one exception a user is meant to read."""


class MamaError(ValueError):
    """Bad input, said in one sentence that names the field, the value and the mend.

    The command line prints it without a traceback and ends with exit code 2.
    """
