"""`mama levels`: methods by sparsity levels, the paper's table."""

from .parser import CommandParser

LEVELS = "0.5,0.6,0.7,0.8,0.9,0.95,0.99"
DESCRIPTION = """Prune a model by several methods at several sparsities, one-shot, and compare the perplexities.

  mama levels MODEL --calibration train.txt --text heldout.txt --seeds 0,1,2 --output levels

Every method starts from the same weights and, for each seed, sees the same calibration tokens. OUTPUT gets a table as
CSV and JSON (every trial, and means and deviations over the seeds) and a plot."""


def make_parser():
    parser = CommandParser("levels", DESCRIPTION)
    parser.add_comparison(LEVELS)
    parser.add_argument("--methods", metavar="NAMES", help="names with commas (default: all of `mama prune --methods`)")
    parser.add_argument("--pattern", default="unstructured", help="unstructured (default), or N:M (sets the level)")
    parser.add_measuring()
    return parser


def parse_levels(text: str) -> list[float]:
    """`"0.9,0.5"` as ascending numbers without repeats. Raises `MamaError`."""
    from ..config import check_sparsity
    from ..errors import MamaError, shown

    try:
        levels = [float(item) for item in text.split(",")]
    except ValueError:
        raise MamaError(f"`levels` is {shown(text)}: give numbers in [0, 1) with commas, such as 0.5,0.9.") from None
    return sorted({check_sparsity(level, "levels") for level in levels})


def main(args) -> dict:
    from tqdm import tqdm

    from ..compare.comparison import Comparison
    from ..compare.tables import write_comparison
    from ..compare.trial import summarise, trial
    from ..config import PruningOptions, check_choice, parse_pattern
    from ..solvers.methods import METHODS
    from .fits import check_fits_source

    levels = parse_levels(args.levels)
    names = args.methods.split(",") if args.methods is not None else METHODS
    methods = list(dict.fromkeys(check_choice(name.strip(), tuple(METHODS), "methods") for name in names))
    group = parse_pattern(args.pattern)
    if group:
        levels = [1.0 - group[0] / group[1]]
    check_fits_source(args.model, PruningOptions(sparsity=max(levels), pattern=args.pattern), args.trust_remote_code)
    with Comparison(args, "levels") as setting:
        trials = []
        with tqdm(total=len(methods) * len(levels) * len(setting.seeds), desc="levels") as bar:
            for method in methods:
                for level in levels:
                    for seed in setting.seeds:
                        bar.set_postfix_str(f"{method} at {level:g}")
                        found = trial(
                            setting.model, setting.dense, setting.rows(seed), setting.heldout, args.batch_size,
                            method=method, sparsity=level, pattern=args.pattern,
                        )
                        trials.append({"method": method, "sparsity": level, "seed": seed, **found})
                        bar.update()
        rows = summarise(trials, ("method", "sparsity"), setting.reference["nats"], setting.vocabulary)
        result = {**setting.described(), "rows": rows, "trials": trials}
        result["protocol"]["pattern"] = args.pattern
        write_comparison(result, setting.output, "levels")
        print(setting.output / "levels.png")
        return result


def run(argv: list[str]) -> int:
    main(make_parser().parse_args(argv))
    return 0
