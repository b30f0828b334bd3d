"""What the commands share: checks that come before any compute, models, text and a parser."""

import argparse
import difflib
import math
import os
from pathlib import Path
from typing import Optional

from ..errors import MamaError

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DATA_FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet", ".csv": "csv"}


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


def nearest(name: str, known) -> str:
    """`" Did you mean --x?"`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


# ---------------------------------------------------------------------- folders


def check_model_source(source: str, needs_weights: bool = True) -> None:
    """A local model folder must have config.json and weights; another name is taken for a hub id.

    Raises:
        MamaError: the folder lacks one of them, is a file, or the name is clearly a path that does not exist.
    """
    path = Path(source).expanduser()
    if path.is_file():
        raise MamaError(f"{source} is a file: give the folder that `save_pretrained` wrote, or a hub id.")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MamaError(f"{source} holds no config.json: give the folder that `save_pretrained` wrote.")
        if needs_weights and not any(any(path.glob(pattern)) for pattern in WEIGHT_FILES):
            raise MamaError(f"{source} holds no weights (*.safetensors): finish saving the model, or give another.")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:  # a hub id is `name` or `owner/name`
        raise MamaError(f"{source} does not exist: give a model folder or a hub id.")


def holds_something(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def check_output_dir(path: str | Path, overwrite: bool = False, model: Optional[str] = None) -> Path:
    """The folder a command may write into; nothing in it is deleted here.

    Raises:
        MamaError: it is a file, holds something (without `overwrite`), cannot be written, or is the model's own.
    """
    path = Path(path).expanduser()
    if path.exists() and not path.is_dir():
        raise MamaError(f"{path} is a file: give a folder to write into.")
    if model is not None and Path(model).is_dir() and path.resolve() == Path(model).resolve():
        raise MamaError(f"{path} is the model's own folder, which would be lost: give another output folder.")
    if holds_something(path) and not overwrite:
        raise MamaError(f"{path} already holds something: give an empty folder, or --overwrite to replace files in it.")
    there = path.absolute()
    while not there.exists():
        there = there.parent
    if not os.access(there, os.W_OK):
        raise MamaError(f"{path} cannot be written: choose a folder that belongs to you.")
    return path


def check_output_file(path: Optional[str]) -> None:
    """Raises `MamaError` if a result could not be written to `path` at the end."""
    if path is not None and Path(path).is_dir():
        raise MamaError(f"{path} is a folder: give the name of a file.")
    if path is not None and not Path(path).absolute().parent.is_dir():
        raise MamaError(f"the folder of {path} does not exist: create it first.")


def remove_model_files(folder: Path) -> None:
    """Removes an earlier model's weights and masks, so that stale shards never lie beside the new ones."""
    for pattern in (*WEIGHT_FILES, "*.index.json", "mama/*.safetensors", "mama/*.json"):
        for path in folder.glob(pattern):
            path.unlink()


# ---------------------------------------------------------------------- models


def load_tokenizer(source: str):
    """The tokenizer beside a model, with a padding token. Raises `MamaError` if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise MamaError(f"no tokenizer can be loaded from {source}: {first_line(error)}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, dtype: str = "auto"):
    """A causal language model in evaluation mode, on the GPU if there is one. Raises `MamaError`."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise MamaError(f"no model can be loaded from {source}: {first_line(error)}") from None
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def sequence_length(source: str, asked: Optional[int]) -> int:
    """The asked length, or the model's context up to 2048. Raises `MamaError` beyond the context."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise MamaError(f"no config.json can be loaded from {source}: {first_line(error)}") from None
    context = getattr(config, "max_position_embeddings", None) or 2048
    if asked is not None and asked > context:
        raise MamaError(f"`sequence_length` is {asked}, more than the model's context of {context}: use at most that.")
    return asked or min(2048, context)


# ---------------------------------------------------------------------- text


def check_file_name(source: str) -> None:
    """Raises `MamaError` for a name that can only be a file and is none, before it is looked up on the hub."""
    path = Path(source).expanduser()
    looks_local = source.startswith((".", "/", "~")) or path.suffix in DATA_FORMATS
    if looks_local and not path.exists():
        raise MamaError(f"{source} does not exist: give a .txt file, a .jsonl file, or a datasets name.")


def calibration_rows(tokenizer, source: str, length: int, tokens: int, seed: int):
    """int64 (n, length) drawn with `seed` from the text in `source`, about `tokens` tokens in all."""
    from ..evaluation import blocks, read_text

    check_file_name(source)
    return blocks(tokenizer, read_text(source), length, limit=max(1, tokens // length), seed=seed)


def heldout_text(source: str) -> str:
    """Text to measure on: a file, or the test split of a dataset. Raises `MamaError`."""
    from ..evaluation import read_text

    check_file_name(source)
    return read_text(source, split="test")


# ---------------------------------------------------------------------- comparisons


def parse_seeds(text: str) -> list[int]:
    """`"0,1,2"` as whole numbers without repeats, in the given order. Raises `MamaError`."""
    try:
        return list(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        raise MamaError(f"`seeds` is {text!r}: give whole numbers with commas, such as 0,1,2.") from None


class Comparison:
    """What every trial of a comparison shares: dense weights, held-out blocks and one draw of calibration per seed.

    Args:
        args: a command's `model, calibration, text, output, overwrite, blocks, seeds, calibration_tokens,
            sequence_length, batch_size, dtype`.

    Raises:
        MamaError: a file, a folder or a value makes no sense.
    """

    def __init__(self, args):
        from ..evaluation import blocks, perplexity
        from ..oneshot.compare import dense_state

        self._args = args
        self.seeds = parse_seeds(args.seeds)
        check_model_source(args.model)
        self.output = check_output_dir(args.output, args.overwrite)
        tokenizer = load_tokenizer(args.model)
        self.length = sequence_length(args.model, args.sequence_length)
        self._rows = {
            seed: calibration_rows(tokenizer, args.calibration, self.length, args.calibration_tokens, seed)
            for seed in self.seeds
        }
        self.heldout = blocks(tokenizer, heldout_text(args.text), self.length, limit=args.blocks)
        self.model = load_model(args.model, args.dtype)
        self.dense = dense_state(self.model)
        self.reference = perplexity(self.model, self.heldout, args.batch_size)
        self.vocabulary = self.model.config.get_text_config().vocab_size

    @property
    def source(self) -> str:
        """The model's folder or hub id."""
        return self._args.model

    def restore(self) -> None:
        """Puts the dense weights back into the model."""
        self.model.load_state_dict(self.dense)

    def rows(self, seed: int):
        """Calibration token ids of one seed, int64 (n, sequence_length)."""
        return self._rows[seed]

    def described(self) -> dict:
        """`model`, `dense` perplexity, `vocabulary` and the protocol, for the result's JSON."""
        return {
            "model": self._args.model,
            "dense": self.reference["perplexity"],
            "vocabulary": self.vocabulary,
            "protocol": {
                "text": self._args.text, "calibration": self._args.calibration, "sequence_length": self.length,
                "tokens": self.reference["tokens"], "calibration_tokens": self._rows[self.seeds[0]].numel(),
                "seeds": self.seeds,
            },
        }
