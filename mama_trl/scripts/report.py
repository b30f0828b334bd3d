"""`mama report`: the HTML report of a finished run, from its numbers."""

import json

from ..disk.folders import check_output_dir
from ..disk.paths import expanded, is_file
from ..errors import MamaError, first_line
from ..report.check import check_report
from .parser import CommandParser

DESCRIPTION = """Rebuild report.html and the plots of a finished run from its report.json.

  mama report runs/demo"""


def make_parser():
    parser = CommandParser("report", DESCRIPTION)
    parser.add_argument("run", metavar="RUN", help="the run's folder")
    return parser


def main(args) -> None:
    path = expanded(args.run) / "report.json"
    if not is_file(path):
        raise MamaError(f"{path} does not exist: give the folder of a finished run, such as runs/demo.")
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MamaError(f"{path} is no valid JSON ({first_line(error)}): run again.") from None
    check_output_dir(path.parent, overwrite=True)
    check_report(numbers, str(path))
    from ..demo.page import write_report
    from ..report.summary import print_summary

    page = write_report(numbers, path.parent)
    print_summary(numbers)
    print(f"report: {page}")


def run(argv: list[str]) -> int:
    main(make_parser().parse_args(argv))
    return 0
