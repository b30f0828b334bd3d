"""`mama run`: the whole way, from a recipe to a report."""

import json
import warnings
from pathlib import Path

from ..errors import MamaError
from .parser import CommandParser, seed

DESCRIPTION = """Run every stage of a recipe: pre-train, fine-tune, GRPO, distil, evaluate, report.

  mama run configs/demo.yaml

The demo needs no network and no GPU. A run that was stopped goes on after its last finished stage."""


def make_parser():
    parser = CommandParser("run", DESCRIPTION)
    parser.add_argument("recipe", metavar="RECIPE", help="YAML recipe, such as configs/demo.yaml")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the run (default: the recipe's)")
    parser.add_argument("--seed", type=seed, help="seed of data, weights and sampling (default: the recipe's)")
    parser.add_argument("--overwrite", action="store_true", help="start anew in a folder that holds something")
    return parser


def main(args) -> None:
    if not Path(args.recipe).is_file():
        raise MamaError(f"{args.recipe} is no file: give a recipe such as configs/demo.yaml.")
    # TRL sets an argument by the name that transformers has just renamed: nothing a reader could act on.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    from ..demo.pipeline import run_pipeline
    from ..report.summary import print_summary

    page = run_pipeline(args.recipe, args.overwrite, output_dir=args.output_dir, seed=args.seed)
    print_summary(json.loads((Path(page).parent / "report.json").read_text(encoding="utf-8")))
    print(f"report: {page}")


def run(argv: list[str]) -> int:
    main(make_parser().parse_args(argv))
    return 0
