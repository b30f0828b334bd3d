"""`mama levels`: methods by sparsity levels, the paper's table."""

from . import common

DESCRIPTION = """Prune a model by several methods at several sparsities, one-shot, and compare the perplexities.

  mama levels MODEL --calibration train.txt --text heldout.txt --levels 0.5,0.7,0.9,0.99 --output levels

Every method starts from the same weights and sees the same calibration tokens. OUTPUT gets a table as CSV and JSON
and a plot."""


def make_parser():
    parser = common.CommandParser("levels", DESCRIPTION)
    parser.add_argument("model", metavar="MODEL", help="model folder or hub id")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="text to calibrate on")
    parser.add_argument("--text", required=True, metavar="FILE", help="other, held-out text to measure on")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for table and plot")
    parser.add_argument("--levels", default="0.5,0.7,0.9,0.99", help="sparsities (default 0.5,0.7,0.9,0.99)")
    parser.add_argument(
        "--methods", default="magnitude,wanda,sparsegpt,mama", help="methods (default magnitude,wanda,sparsegpt,mama)"
    )
    parser.add_argument("--blocks", type=common.positive, metavar="N", help="only the first N blocks (default: all)")
    parser.add_calibration()
    parser.add_measuring()
    return parser


def parse_levels(text: str) -> list[float]:
    """`"0.9,0.5"` as ascending numbers without repeats. Raises `MamaError`."""
    from ..config import check_sparsity
    from ..errors import MamaError

    try:
        levels = [float(item) for item in text.split(",")]
    except ValueError:
        raise MamaError(f"`levels` is {text!r}: give numbers in [0, 1) with commas, such as 0.5,0.9.") from None
    return sorted({check_sparsity(level, "levels") for level in levels})


def main(args) -> dict:
    import torch
    from tqdm import tqdm

    from ..config import check_choice
    from ..evaluation import blocks, perplexity
    from ..oneshot import METHODS, prune
    from ..report.levels import write_levels

    levels = parse_levels(args.levels)
    methods = list(dict.fromkeys(check_choice(name.strip(), METHODS, "methods") for name in args.methods.split(",")))
    common.check_model_source(args.model)
    output = common.check_output_dir(args.output, args.overwrite)
    tokenizer = common.load_tokenizer(args.model)
    length = common.sequence_length(args.model, args.sequence_length)
    rows = common.calibration_rows(tokenizer, args.calibration, length, args.calibration_tokens, args.seed)
    heldout = blocks(tokenizer, common.heldout_text(args.text), length, limit=args.blocks)
    model = common.load_model(args.model, args.dtype)
    dense = {name: value.detach().clone() for name, value in model.state_dict().items()}
    reference = perplexity(model, heldout, args.batch_size)
    found = []
    with tqdm(total=len(methods) * len(levels), desc="levels") as bar:
        for method in methods:
            for level in levels:
                bar.set_postfix_str(f"{method} at {level:g}")
                with torch.no_grad():
                    model.load_state_dict(dense)
                masks = prune(model, rows, method, level, batch_size=args.batch_size, progress=False)
                value = perplexity(model, heldout, args.batch_size)["perplexity"]
                found.append({"method": method, "sparsity": level, "perplexity": value, "reached": masks.sparsity()})
                bar.update()
    result = {
        "model": args.model,
        "dense": reference["perplexity"],
        "protocol": {
            "text": args.text, "calibration": args.calibration, "sequence_length": length,
            "tokens": reference["tokens"], "calibration_tokens": rows.numel(), "seed": args.seed,
        },
        "rows": found,
    }
    write_levels(result, output)
    print(output / "levels.png")
    return result


def run(argv: list[str]) -> int:
    main(make_parser().parse_args(argv))
    return 0
