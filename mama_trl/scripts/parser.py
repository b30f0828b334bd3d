"""The parser of the commands without training, and its types."""

import argparse
import math
from dataclasses import MISSING, fields

from ..config import PruningOptions
from ..errors import MamaError

DTYPES = ("auto", "float32", "bfloat16", "float16")


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are one sentence (`MamaError`) and whose help keeps line breaks."""

    def __init__(self, command: str, description: str):
        super().__init__(
            prog=f"mama {command}", description=description, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise MamaError(f"{message} (see `{self.prog} --help`)")

    def add_measuring(self) -> None:
        """The options of every command that runs a model over blocks of text."""
        self.add_argument("--sequence_length", type=positive, help="tokens of a block (default: the model's, to 2048)")
        self.add_argument("--batch_size", type=positive, default=8, help="blocks at once (default 8)")
        self.add_argument("--dtype", default="auto", choices=DTYPES, help="how to load the weights (default: as saved)")

    def add_options(self) -> None:
        """One flag for each field of `PruningOptions`, with its help and default; see `options_of`."""
        for option in fields(PruningOptions):
            listed = "list" in str(option.type)
            default = None if option.default is MISSING else option.default
            said = f" (default {default})" if default is not None else ""
            self.add_argument(
                f"--{option.name}", nargs="+" if listed else None, type=share if "float" in str(option.type) else str,
                metavar=option.name.rsplit("_", 1)[-1].upper(), help=option.metadata["help"].replace("%", "%%") + said,
            )

    def add_calibration(self) -> None:
        """The options of every command that draws calibration tokens."""
        self._add_draw()
        self.add_argument("--seed", type=int, default=0, help="draws the calibration blocks (default 0)")

    def add_comparison(self, levels: str) -> None:
        """What every command takes that compares perplexities over levels and several draws of calibration tokens."""
        self.add_argument("model", metavar="MODEL", help="model folder or hub id")
        self.add_argument("--calibration", required=True, metavar="FILE", help="text to calibrate on")
        self.add_argument("--text", required=True, metavar="FILE", help="other, held-out text to measure on")
        self.add_argument("--output", required=True, metavar="DIR", help="folder for table and plot")
        self.add_argument("--levels", default=levels, help=f"sparsities (default {levels})")
        self.add_argument("--blocks", type=positive, metavar="N", help="only the first N blocks (default: all)")
        self._add_draw()
        self.add_argument("--seeds", default="0", help="draws of the calibration blocks, such as 0,1,2 (default 0)")

    def _add_draw(self) -> None:
        self.add_argument(
            "--calibration_tokens", type=positive, default=32768,
            help="tokens drawn (default 32768); method mama reads about half of them, which it goes through twice",
        )
        self.add_argument("--overwrite", action="store_true", help="replace files in a folder that holds something")


def options_of(args, **changes):
    """The `PruningOptions` of parsed arguments: flags that were given, else the fields' own defaults."""
    given = {option.name: getattr(args, option.name) for option in fields(PruningOptions)}
    return PruningOptions(**{**{name: value for name, value in given.items() if value is not None}, **changes})


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return value


def share(text: str) -> float:
    """argparse type: a finite number; its range is checked where it is used."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is no number; give a share such as 0.8")
    return value
