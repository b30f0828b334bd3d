"""The parser of the commands without training, and its types."""

import argparse
import math
from dataclasses import MISSING, fields

from ..config import PruningOptions
from ..errors import MamaError, shown
from ..fields import check_value

DTYPES = ("auto", "float32", "bfloat16", "float16")


class CommandParser(argparse.ArgumentParser):
    """argparse whose errors are one sentence (`MamaError`) and whose help keeps line breaks."""

    def __init__(self, command: str, description: str):
        super().__init__(
            prog=f"mama {command}", description=description, allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_args(self, args=None, namespace=None):
        """As in argparse; texts that no file, tokenizer or terminal can have are refused too."""
        parsed = super().parse_args(args, namespace)
        for name, value in vars(parsed).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str):
                    check_value(name, text, str)
        return parsed

    def error(self, message: str):
        raise MamaError(f"{message} (see `{self.prog} --help`)")

    def add_measuring(self) -> None:
        """The options of every command that runs a model over blocks of text."""
        self.add_argument("--sequence_length", type=several, help="tokens of a block (default: the model's, to 2048)")
        self.add_argument("--batch_size", type=positive, default=8, help="blocks at once (default 8)")
        self.add_argument("--dtype", default="auto", choices=DTYPES, help="how to load the weights (default: as saved)")
        self.add_argument(
            "--trust_remote_code", action="store_true",
            help="run the Python code that the model brings with it; never without this flag",
        )

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
        self.add_argument("--seed", type=seed, default=0, help="draws the calibration blocks (default 0)")

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
    return _whole(text, 1, "no whole number above 0")


def several(text: str) -> int:
    """argparse type: an integer of at least 2, such as the tokens of a block, the first of which is not scored."""
    return _whole(text, 2, "no whole number above 1")


def seed(text: str) -> int:
    """argparse type: an integer that random generators take."""
    return _whole(text, 0, "no whole number from 0 to 4294967295", 2**32 - 1)


def _whole(text: str, least: int, otherwise: str, most: int = 2**31 - 1) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{shown(text)} is {otherwise}{', or too large' if value > most else ''}")
    return value


def share(text: str) -> float:
    """argparse type: a finite number; its range is checked where it is used."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no number; give a share such as 0.8")
    return value


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Every option that a parser knows; argparse has no public name for them."""
    return parser._actions
