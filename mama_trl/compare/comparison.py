"""What every trial of a comparison shares."""

from contextlib import ExitStack

from ..disk.folders import check_output_dir
from ..disk.lock import locked
from ..errors import MamaError, shown
from ..evaluation.loading import (
    check_ids,
    check_model_source,
    check_tokenizer,
    load_model,
    load_tokenizer,
    sequence_length,
)
from ..evaluation.perplexity import perplexity
from ..evaluation.text import blocks, calibration_rows, heldout_text
from .trial import dense_state


def parse_seeds(text: str) -> list[int]:
    """`"0,1,2"` as whole numbers without repeats, in the given order. Raises `MamaError`."""
    try:
        seeds = list(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        seeds = [-1]
    if not all(0 <= seed < 2**32 for seed in seeds):
        raise MamaError(f"`seeds` is {shown(text)}: give whole numbers from 0 on with commas, such as 0,1,2.")
    return seeds


class Comparison:
    """What every trial of a comparison shares: dense weights, held-out blocks and one draw of calibration per seed.

    Made of what the command reads, it has checked everything; as a context, it holds the output folder and the model.

    Args:
        args: a command's `model, calibration, text, output, overwrite, blocks, seeds, calibration_tokens,
            sequence_length, batch_size, dtype, trust_remote_code`.
        name: of the files that will hold the result.

    Raises:
        MamaError: a file, a folder or a value makes no sense.
    """

    def __init__(self, args, name: str):
        self._files = [f"{name}.{kind}" for kind in ("json", "csv", "png")]
        self._args, trust = args, args.trust_remote_code
        self.seeds = parse_seeds(args.seeds)
        self._check_output()
        check_model_source(args.model, trust_remote_code=trust)
        tokenizer = load_tokenizer(args.model, trust)
        check_tokenizer(tokenizer, args.model, trust)
        self.length = sequence_length(args.model, args.sequence_length, trust)
        self._rows = {
            seed: calibration_rows(tokenizer, args.calibration, self.length, args.calibration_tokens, seed)
            for seed in self.seeds
        }
        self.heldout = blocks(tokenizer, heldout_text(args.text), self.length, limit=args.blocks)
        for rows in (self.heldout, *self._rows.values()):
            check_ids(rows, args.model, trust)

    def _check_output(self) -> None:
        args = self._args
        inputs = {"the model": args.model, "the calibration text": args.calibration, "the text": args.text}
        self.output = check_output_dir(args.output, args.overwrite, inputs, files=self._files)

    def __enter__(self) -> "Comparison":
        """Holds the output folder for this process, and loads and measures the dense model."""
        self._held = ExitStack()
        with ExitStack() as held:
            held.enter_context(locked(self.output))
            self._check_output()  # nobody has finished there meanwhile
            self.model = load_model(self._args.model, self._args.dtype, self._args.trust_remote_code)
            self.dense = dense_state(self.model)
            self.reference = perplexity(self.model, self.heldout, self._args.batch_size)
            self.vocabulary = self.model.config.get_text_config().vocab_size
            self._held = held.pop_all()
        return self

    def __exit__(self, *error) -> None:
        self._held.close()

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
