"""`mama prune`: one-shot pruning of a saved model."""

import argparse
import warnings
from contextlib import contextmanager

from ..config import RECORDED_BUDGETS, check_choice, check_sparsity
from ..disk.folders import check_output_dir
from ..disk.lock import locked
from ..disk.removal import MODEL_FILES, remove_model_files
from ..disk.writing import write_folder
from ..errors import MamaError
from .parser import CommandParser, options_of

DESCRIPTION = """Prune a saved model without training it, block by block.

  mama prune MODEL --sparsity 0.7 --calibration text.txt --output pruned

writes an ordinary model with zeros in OUTPUT, which loads with AutoModelForCausalLM.from_pretrained, and its masks in
OUTPUT/mama, which `mama sft`, `mama grpo` and `mama distill` keep. Each finished block is stored in OUTPUT/.progress
while it runs: after a kill the same command goes on from there.

  mama prune MODEL --pattern neurons --sparsity 0.5 --calibration text.txt --output smaller

removes the same share of MLP neurons (or heads) from every layer: OUTPUT is a smaller dense model without masks.
Indicators and budgets other than magnitude, activation, uniform, predicted and measured are read from what a training
run left beside MODEL: statistics in MODEL/mama, Adam's second moments in a checkpoint's optimizer.pt."""
STRUCTURES = ("heads", "neurons")


class ListMethods(argparse.Action):
    """`--methods`: prints what each method does and needs, and ends."""

    def __call__(self, parser, *_):
        from ..solvers.methods import overview

        print(overview())
        parser.exit()


def make_parser():
    parser = CommandParser("prune", DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pruned model")
    parser.add_argument("--method", default="mama", help="how: mama (default) or another of --methods")
    parser.add_argument("--methods", nargs=0, action=ListMethods, help="list the methods and what each needs, and end")
    parser.add_options()
    parser.add_argument(
        "--calibration", metavar="FILE",
        help="text to measure activations on: .txt, .jsonl with `text`, or a datasets name; only magnitude needs none",
    )
    parser.add_calibration()
    parser.add_measuring()
    parser.add_argument("--device", help="where blocks run: cpu, cuda, cuda:1 (default: a GPU if there is one)")
    parser.add_argument(
        "--offload", choices=("none", "cpu", "disk"),
        help="where the other blocks are while one runs: none = on the device, CPU memory, or the model's own files "
        "(default: the first of these that fits)",
    )
    return parser


def main(args) -> None:
    if args.pattern in STRUCTURES:
        remove_structures(args)
    else:
        prune_connections(args)


def prune_connections(args) -> None:
    from ..evaluation.loading import check_model_source
    from ..pruning.prune import check_method
    from ..solvers.methods import METHODS
    from .fits import check_fits_source

    options = options_of(args)
    method = METHODS[check_choice(args.method, tuple(METHODS), "method")]
    check_method(options, method, args.calibration is not None)
    check_model_source(args.model, trust_remote_code=args.trust_remote_code)
    check_fits_source(args.model, options, args.trust_remote_code)
    with _begun(args) as (unfinished, tokenizer, rows):
        _prune(args, options, method, unfinished, tokenizer, rows)


def _prune(args, options, method, unfinished, tokenizer, rows) -> None:
    from ..evaluation.loading import load_model
    from ..indicators.combine import Criterion
    from ..indicators.recorded import recorded
    from ..indicators.source import StoredScores
    from ..model.targets import find_targets
    from ..pruning.checks import zeros_in
    from ..pruning.duration import rough_seconds, told
    from ..pruning.placement import LocalPlacement
    from ..pruning.prune import check_scores, prune
    from ..pruning.resume import OFFLOADED, KeptProgress

    placing = _placing(args, rows)
    folder = unfinished.folder / OFFLOADED if placing.device_map else None
    model = load_model(
        args.model, args.dtype, args.trust_remote_code, placing.device, placing.device_map, folder
    )
    targets = find_targets(model, options.target_modules, options.exclude_modules, experts=True)
    tokens = 0 if rows is None else rows.numel()
    lasts = rough_seconds(targets, method, tokens, next(model.parameters()).dtype, placing.device)
    print(f"holds {placing.said}" + (f"; takes about {told(lasts)}, more with --refine" if lasts else ""))
    needed = Criterion(options.weights).sourced or options.budget in RECORDED_BUDGETS
    scores = StoredScores(recorded(args.model, model, targets) if needed else {})
    check_scores(options, method, scores, allocated=False)
    progress = True
    if rows is not None:
        _announce(unfinished, model, rows)
        progress = KeptProgress(f"prune ({method.label})", unfinished)
    masks = prune(
        model, rows, method, scores=scores, placement=LocalPlacement(targets, folder), batch_size=args.batch_size,
        progress=progress, **vars(options),
    )
    output = _save(model, tokenizer, args.output)
    masks.save(output)
    zeros = sum(int(zeros_in(target)) for target in targets)
    size = sum(target.matrix.numel() for target in targets)
    pruned = sum(masks.pruned[name] for name in {target.parameter_name for target in targets})
    unfinished.remove()
    print(
        f"{zeros / size:.2%} of the prunable weights are zero, {pruned / size:.2%} by the masks ({args.method}, "
        f"{options.pattern}): {output}"
    )


def remove_structures(args) -> None:
    from ..evaluation.loading import check_model_source
    from ..masks.maskset import MaskSet
    from ..pruning.structures.remove import STRUCTURE_METHODS

    sparsity = check_sparsity(0.5 if args.sparsity is None else args.sparsity)
    check_choice(args.method, STRUCTURE_METHODS, "method")
    options = options_of(args, pattern="unstructured")
    if args.offload not in (None, "none"):
        raise MamaError(f"`offload` is {args.offload!r}, but whole {args.pattern} are removed in memory: leave it out.")
    args.offload = "none"
    for name in ("scope", "indicators", "budget", "budget_blend", "target_modules", "exclude_modules"):
        if getattr(args, name) is not None:
            raise MamaError(
                f"`{name}` is {getattr(args, name)!r}, which removing whole {args.pattern} does not take: leave it out."
            )
    check_model_source(args.model, trust_remote_code=args.trust_remote_code)
    if args.calibration is None:
        raise MamaError(f"`calibration` is missing: pattern {args.pattern} measures activations: give a text file.")
    if MaskSet.load(args.model) is not None:
        raise MamaError(
            f"{args.model} has masks, which do not fit a model with fewer {args.pattern}: remove whole structures "
            "first, from the dense model, and single connections after."
        )
    with _begun(args) as (unfinished, tokenizer, rows):
        _remove(args, sparsity, options.redistribution, unfinished, tokenizer, rows)


def _remove(args, sparsity, redistribution, unfinished, tokenizer, rows) -> None:
    from ..evaluation.loading import load_model
    from ..pruning.resume import KeptProgress
    from ..pruning.structures.remove import prune_structures

    placing = _placing(args, rows)
    model = load_model(args.model, args.dtype, args.trust_remote_code, placing.device)
    _announce(unfinished, model, rows)
    dense = model.num_parameters()
    small = prune_structures(
        model, rows, args.pattern, sparsity, args.method, redistribution, batch_size=args.batch_size,
        seed=args.seed, progress=KeptProgress(f"prune {args.pattern} ({args.method})", unfinished),
    )
    output = _save(small, tokenizer, args.output)
    unfinished.remove()
    print(f"{small.num_parameters():,} of {dense:,} parameters stay ({args.method}, {args.pattern}): {output}")


@contextmanager
def _begun(args):
    """(what an earlier call left, tokenizer, calibration sequences or None), all checks done and the folder held."""
    from ..evaluation.loading import check_ids, check_tokenizer, load_tokenizer, sequence_length
    from ..evaluation.text import calibration_rows
    from ..pruning.resume import Unfinished

    output = _check_output(args)
    unfinished = Unfinished(output, _command(args), args.overwrite)
    tokenizer = load_tokenizer(args.model, args.trust_remote_code)
    check_tokenizer(tokenizer, args.model, args.trust_remote_code)
    rows = None
    if args.calibration is not None:
        length = sequence_length(args.model, args.sequence_length, args.trust_remote_code)
        rows = calibration_rows(tokenizer, args.calibration, length, args.calibration_tokens, args.seed)
        check_ids(rows, args.model, args.trust_remote_code)
    with locked(output):
        _check_output(args)  # nobody has finished there meanwhile
        try:
            yield unfinished, tokenizer, rows
        except MamaError:
            unfinished.retract()
            raise


def _check_output(args):
    """The output folder. Raises `MamaError` if it holds something, or writing there would change what is read."""
    from ..pruning.resume import Unfinished

    inputs = {"the model": args.model, "the calibration text": args.calibration}
    overwrite = args.overwrite or Unfinished.exists(args.output)
    return check_output_dir(args.output, overwrite, inputs, files=MODEL_FILES)


def _placing(args, rows):
    """Where the weights lie; with a model's own code, of which nothing can be sketched, all of it on the device."""
    from ..evaluation.placing import Placing, device_of, placing_of

    if args.trust_remote_code and args.offload in (None, "none"):
        device = device_of(args.device)
        return Placing(device, "none", None, 0, f"the whole model on {device}")
    return placing_of(args.model, args.dtype, 0 if rows is None else rows.numel(), args.device, args.offload)


def _announce(unfinished, model, rows) -> None:
    unfinished.begin(model, rows)
    if unfinished.blocks:
        print(f"going on after {unfinished.blocks} finished blocks that {unfinished.folder.parent} holds")


def _save(model, tokenizer, output):
    from ..engines.offload import is_offloaded
    from ..evaluation.placing import file_size

    output = check_output_dir(output, overwrite=True)

    def write(folder):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*offloaded modules")  # one file at a time is in memory
            model.save_pretrained(folder, **({"max_shard_size": file_size(model)} if is_offloaded(model) else {}))
        tokenizer.save_pretrained(folder)

    write_folder(output, write, before=remove_model_files)
    return output


def _command(args) -> dict:
    """What decides the result: a state that another command, or another version, left is not gone on with."""
    import torch

    from .. import __version__

    options = {key: value for key, value in vars(args).items() if key not in ("output", "overwrite", "offload")}
    return {**options, "version of mama_trl": __version__, "version of torch": torch.__version__}


def run(argv: list[str]) -> int:
    main(make_parser().parse_args(argv))
    return 0
