"""Hands a training command over to accelerate's launcher."""

import subprocess
from importlib.resources import files
from pathlib import Path

from ..disk.paths import is_file
from ..disk.yaml_files import read_settings
from ..errors import MamaError, shown
from ..fields import nearest
from ..training.settings import refusals_of
from .parser import actions_of

ACCELERATE_CONFIGS = ("single", "ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2", "two-node")


def without(argv: list[str], flag: str) -> list[str]:
    if flag not in argv:
        return list(argv)
    index = argv.index(flag)
    return argv[:index] + argv[index + 2 :]


def accelerate_file(name: str) -> Path:
    """Path of a bundled config, or of the file `name`. Raises `MamaError` if it is neither."""
    if name in ACCELERATE_CONFIGS:
        return Path(str(files("mama_trl") / "accelerate_configs" / f"{name}.yaml"))
    if is_file(name):
        read_settings(name, f"accelerate_config {name}")
        return Path(name)
    raise MamaError(
        f"`accelerate_config` is {shown(name)}, neither a file nor one of {', '.join(ACCELERATE_CONFIGS)}."
    )


def launch_arguments(parser, config: str, extra: list[str], argv: list[str]) -> list[str]:
    """What follows `accelerate launch`: config, its own flags, and this command as a module.

    A module, since the scripts' folder must not come first on the path: its names would hide other packages.
    """
    from accelerate.commands.launch import launch_command_parser

    path = accelerate_file(config)
    options = [option for action in actions_of(launch_command_parser()) for option in action.option_strings]
    for item in extra:
        flag = item.partition("=")[0]
        if flag.startswith("--") and flag not in options:
            raise MamaError(
                f"neither {parser.prog} nor accelerate knows {flag}.{nearest(flag, parser.flags + options)}"
            )
    ours = _subtract(without(argv, "--accelerate_config"), extra)
    return ["--config_file", str(path), *extra, "--module", "mama_trl.cli", parser.prog.split()[-1], *ours]


def _subtract(items: list[str], part: list[str]) -> list[str]:
    """`items` without the ordered subsequence `part`."""
    waiting = list(part)
    out = []
    for item in items:
        if waiting and item == waiting[0]:
            waiting.pop(0)
        else:
            out.append(item)
    return out


def hand_over(parser, config: str, extra: list[str], argv: list[str]) -> int:
    """Runs this command under accelerate's launcher; returns its exit code."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    theirs = launch_command_parser()
    theirs.error = parser.error  # one sentence instead of a page of usage
    arguments = theirs.parse_args(launch_arguments(parser, config, extra, argv))
    try:
        with refusals_of(f"accelerate ({config})"):
            launch_command(arguments)
    except subprocess.CalledProcessError as error:  # the process has said why on stderr
        return error.returncode
    except ChildFailedError as error:
        return next(iter(error.failures.values())).exitcode or 1
    return 0
