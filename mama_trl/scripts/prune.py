"""`mama prune`: one-shot pruning of a saved model."""

from ..folders import check_output_dir, remove_model_files
from .parser import CommandParser, share

LEFT_BUDGETS = ("reward", "curvature")

DESCRIPTION = """Prune a saved model without training it, block by block.

  mama prune MODEL --sparsity 0.7 --calibration text.txt --output pruned

writes an ordinary model with zeros in OUTPUT, which loads with AutoModelForCausalLM.from_pretrained, and its masks in
OUTPUT/mama, which `mama sft`, `mama grpo` and `mama distill` keep. Each finished block is stored in OUTPUT/.progress
while it runs: after a kill the same command goes on from there.

  mama prune MODEL --pattern neurons --sparsity 0.5 --calibration text.txt --output smaller

removes the same share of MLP neurons (or heads) from every layer: OUTPUT is a smaller dense model without masks."""


def make_parser():
    parser = CommandParser("prune", DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the pruned model")
    parser.add_argument("--sparsity", type=share, default=0.5, help="pruned share, in [0, 1) (default 0.5)")
    parser.add_argument(
        "--method", default="mama",
        help="mama (default: mask and redistribution together), magnitude, wanda, sparsegpt, alps",
    )
    parser.add_argument(
        "--budget",
        help="sparsity of each matrix: uniform; sensitivity, one pass of gradients (default for mama); reward or "
        "curvature, as a training run left them beside MODEL",
    )
    parser.add_argument(
        "--indicators", nargs="+", metavar="NAME",
        help="for mama: which connections to keep: activation (default), magnitude, or sensitivity, movement, reward "
        "and curvature, as a training run left them beside MODEL; name=weight weighs one against the others",
    )
    parser.add_argument(
        "--redistribution", default="least_squares",
        help="for mama: where the pruned connections' values go: least_squares (default), bias, mean, none",
    )
    parser.add_argument(
        "--pattern", default="unstructured", help="unstructured (default), N:M such as 2:4, or whole: neurons, heads"
    )
    parser.add_argument(
        "--scope", default="matrix",
        help="for mama: where connections compete, within a matrix (default) or each output row",
    )
    parser.add_argument(
        "--calibration", metavar="FILE",
        help="text to measure activations on: .txt, .jsonl with `text`, or a datasets name; only magnitude needs none",
    )
    parser.add_calibration()
    parser.add_measuring()
    return parser


def main(args) -> None:
    from ..config import REDISTRIBUTIONS, check_choice, check_sparsity, parse_indicators, parse_pattern
    from ..errors import MamaError
    from ..evaluation.loading import check_model_source, load_model, load_tokenizer, sequence_length
    from ..evaluation.text import calibration_rows
    from ..masks.maskset import MaskSet
    from ..pruning.prune import BUDGETS, METHODS, SCOPES, prune
    from ..pruning.resume import Unfinished
    from ..pruning.structures.remove import STRUCTURE_METHODS, prune_structures
    from ..pruning.structures.units import STRUCTURES

    check_sparsity(args.sparsity)
    whole = args.pattern in STRUCTURES
    check_choice(args.method, STRUCTURE_METHODS if whole else METHODS, "method")
    check_choice(args.scope, SCOPES, "scope")
    if args.budget is not None:
        check_choice(args.budget, (*BUDGETS, *LEFT_BUDGETS), "budget")
    check_choice(args.redistribution, REDISTRIBUTIONS, "redistribution")
    weights = parse_indicators(args.indicators or ["activation"])
    if (args.indicators or args.redistribution != "least_squares") and (whole or args.method != "mama"):
        raise MamaError(
            "`indicators` and `redistribution` are for method mama, and not for whole structures: leave them out."
        )
    if not whole:
        parse_pattern(args.pattern)
    if args.scope == "row" and (whole or args.method != "mama"):
        raise MamaError("`scope` is 'row', which only method mama takes, and no pattern of whole structures.")
    check_model_source(args.model)
    if args.calibration is None and (whole or args.method != "magnitude" or args.budget == "sensitivity"):
        raise MamaError(f"`calibration` is missing: {args.method} measures activations on a text; give a file.")
    if whole and MaskSet.load(args.model) is not None:
        raise MamaError(
            f"{args.model} has masks, which do not fit a model with fewer {args.pattern}: remove whole structures "
            "first, from the dense model, and single connections after."
        )
    output = check_output_dir(args.output, args.overwrite or Unfinished.exists(args.output), args.model)
    unfinished = Unfinished(output, _command(args), args.overwrite)
    tokenizer = load_tokenizer(args.model)
    rows = None
    if args.calibration is not None:
        length = sequence_length(args.model, args.sequence_length)
        rows = calibration_rows(tokenizer, args.calibration, length, args.calibration_tokens, args.seed)
    model = load_model(args.model, args.dtype)
    options = {} if whole else _from_training(args, model, weights)
    if rows is not None:
        unfinished.begin(model, rows)
        if unfinished.blocks:
            print(f"going on after {unfinished.blocks} finished blocks that {output} holds")
    if whole:
        dense = model.num_parameters()
        small = prune_structures(
            model, rows, args.pattern, args.sparsity, args.method, batch_size=args.batch_size, seed=args.seed,
            unfinished=unfinished,
        )
        _save(small, tokenizer, output)
        unfinished.remove()
        print(f"{small.num_parameters():,} of {dense:,} parameters stay ({args.method}, {args.pattern}): {output}")
        return
    masks = prune(
        model, rows, args.method, args.sparsity, args.pattern, batch_size=args.batch_size,
        unfinished=None if rows is None else unfinished, scope=args.scope, redistribution=args.redistribution,
        **options,
    )
    _save(model, tokenizer, output)
    masks.save(output)
    unfinished.remove()
    print(f"{masks.sparsity():.2%} of the prunable weights are zero ({args.method}, {args.pattern}): {output}")


def _from_training(args, model, weights: dict[str, float]) -> dict:
    """`budget` and indicators as options of `prune`, read from what a training run left beside the model."""
    from ..errors import MamaError
    from ..indicators.recorded import indicator_options, recorded
    from ..model.targets import find_targets
    from ..selection.allocation import default_blend, shared_by

    options = {"budget": args.budget}
    if args.budget not in LEFT_BUDGETS and not args.indicators:
        return options
    targets = find_targets(model, experts=True)
    scores = recorded(args.model, model, targets)
    if args.indicators:
        options |= indicator_options(targets, scores, weights)
    if args.budget in LEFT_BUDGETS:
        if args.budget not in scores:
            raise MamaError(
                f"`budget` is {args.budget!r}, which no training run left beside {args.model}: use uniform or "
                "sensitivity."
            )
        options["budget"] = "uniform"
        if args.pattern == "unstructured":
            blend = default_blend(args.sparsity)
            options["layer_sparsity"] = shared_by(scores[args.budget], targets, args.sparsity, blend)
    return options


def _save(model, tokenizer, output) -> None:
    output.mkdir(parents=True, exist_ok=True)
    remove_model_files(output)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def _command(args) -> dict:
    """What decides the result: a state that another command, or another version, left is not gone on with."""
    import torch

    from .. import __version__

    options = {key: value for key, value in vars(args).items() if key not in ("output", "overwrite")}
    return {**options, "version of mama_trl": __version__, "version of torch": torch.__version__}


def run(argv: list[str]) -> int:
    main(make_parser().parse_args(argv))
    return 0
