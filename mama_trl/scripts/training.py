"""What the four training commands share: parser, hand-over to accelerate, and the run itself."""

import argparse
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Callable, Optional

import yaml
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_torch_bf16_gpu_available
from trl import ScriptArguments, TrlParser

from ..checkpoints import STATE_FILE, cut_off, newest_whole
from ..config import MamaConfig
from ..errors import MamaError
from ..hub import connect
from ..storage import FOLDER
from .common import check_model_source, check_output_dir, first_line, holds_something, nearest

logger = logging.getLogger(__name__)

ACCELERATE_CONFIGS = ("single", "ddp", "zero1", "zero2", "zero3", "zero3-offload", "fsdp2", "two-node")
# Of some 250 flags, those a first run needs; `--help_all` shows the others.
FIRST_FLAGS = (
    "model_name_or_path", "dtype", "teacher_model_name_or_path", "from_scratch", "dataset_name", "dataset_config",
    "dataset_train_split", "dataset_test_split", "prompt_template", "chat", "reward_funcs",
)
RUN_FLAGS = (
    "output_dir", "overwrite", "resume_from_checkpoint", "accelerate_config", "num_train_epochs", "max_steps",
    "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "num_generations",
    "max_completion_length", "beta", "temperature", "cross_entropy_weight", "eval_strategy", "logging_steps",
    "save_steps", "seed", "bf16", "use_cpu", "push_to_hub", "report_to",
)


@dataclass
class TrainingArguments(ScriptArguments):
    """Arguments of every training command beside the trainer's own."""

    prompt_template: Optional[str] = field(
        default=None,
        metadata={"help": "Format string that makes the prompt from a row's columns, such as '{question} Answer:'."},
    )
    chat: bool = field(default=False, metadata={"help": "Put prompts (and completions) into the chat template."})
    overwrite: bool = field(default=False, metadata={"help": "Train into an output_dir that holds something."})
    accelerate_config: Optional[str] = field(
        default=None,
        metadata={
            "help": f"Start through accelerate: {', '.join(ACCELERATE_CONFIGS)}, or a YAML file. Flags of "
            "`accelerate launch`, such as --num_processes 2, may follow."
        },
    )


class TrainingParser(TrlParser):
    """`TrlParser` with a help for newcomers and errors in one sentence."""

    def __init__(self, dataclass_types, prog: str, description: str):
        super().__init__(
            dataclass_types, prog=prog, description=description, allow_abbrev=False, add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):
        raise MamaError(f"{message} (see `{self.prog} --help`)")

    def show_help(self, everything: bool) -> None:
        """The first flags in groups, or with `everything` all of them."""
        if everything:
            self.print_help()
            return
        mama = tuple(MamaConfig.__dataclass_fields__)
        page = argparse.ArgumentParser(
            prog=self.prog, add_help=False, usage=f"{self.prog} [--config FILE.yaml] [options]",
            description=self.description, formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="A YAML file sets the defaults and flags override it. --help_all shows every option of the trainer.",
        )
        by_name = {action.dest: action for action in reversed(self._actions)}  # --x, not its later twin --no_x
        for title, names in (
            ("what to train on", FIRST_FLAGS), ("what to prune, and how", mama), ("how to train", RUN_FLAGS)
        ):
            group = page.add_argument_group(title)
            for name in names:
                if name in by_name:
                    _add(group, by_name[name])
        page.print_help()

    @property
    def flags(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings]


def _add(group, action) -> None:
    """One entry of the short help, under the flag's first spelling."""
    shown = action.help or ""
    default = action.default
    if default not in (None, argparse.SUPPRESS, [], "", False) and not callable(default):
        shown += f" (default {default})".replace("%", "%%")
    group.add_argument(action.option_strings[0], metavar=action.dest.rsplit("_", 1)[-1].upper(), help=shown)


def make_parser(dataclass_types, command: str, description: str) -> TrainingParser:
    """Parser of `mama COMMAND`; `MamaConfig`'s checks come first if it is first among the types."""
    parser = TrainingParser(dataclass_types, f"mama {command}", description)
    if not is_torch_bf16_gpu_available():
        parser.set_defaults(bf16=False)  # TRL's own default is an error where there is no such GPU
    return parser


def parse(parser: TrainingParser, argv: list[str]) -> Optional[tuple]:
    """The dataclasses, or None when help was shown or accelerate has taken over and finished.

    Raises:
        MamaError: unreadable config, unknown option, or a value that makes no sense.
        SystemExit: with accelerate's exit code, if it failed.
    """
    argv = _split_equals(argv)
    if any(flag in argv for flag in ("-h", "--help", "--help_all")):
        parser.show_help("--help_all" in argv)
        return None
    recipe = read_recipe(argv)
    known = {action.dest for action in parser._actions}
    for key in recipe:
        if key not in known and key != "env":
            raise MamaError(f"the config file has {key!r}, which {parser.prog} does not know.{nearest(key, known)}")
    rest = _without(argv, "--config")
    namespace, unknown = parser.parse_known_args(rest)
    launcher = namespace.accelerate_config or recipe.get("accelerate_config")
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if launcher and not launched:
        code = hand_over(parser, launcher, unknown, argv)
        if code:
            raise SystemExit(code)
        return None
    for flag in unknown:
        raise MamaError(f"{parser.prog} does not know {flag}.{nearest(flag, parser.flags)}")
    try:
        parsed = parser.parse_args_and_config(argv)
    except MamaError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise MamaError(first_line(error)) from None
    return parsed


def run(parser: TrainingParser, main: Callable, argv: list[str]) -> int:
    """A training command: `main` with the parsed dataclasses, unless `parse` handed the command to a launcher."""
    parsed = parse(parser, argv)
    if parsed is not None:
        main(*parsed)
    return 0


def read_recipe(argv: list[str]) -> dict:
    """The mapping in the file after `--config`; {} without one. Raises `MamaError` if it is no mapping."""
    if "--config" not in argv:
        return {}
    index = argv.index("--config") + 1
    if index == len(argv):
        raise MamaError("--config wants the name of a YAML file after it.")
    try:
        recipe = yaml.safe_load(Path(argv[index]).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise MamaError(f"--config {argv[index]} cannot be read: {first_line(error)}.") from None
    except yaml.YAMLError as error:
        raise MamaError(f"--config {argv[index]} is no valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(recipe, dict):
        raise MamaError(f"--config {argv[index]} holds no `name: value` lines.")
    return recipe


def _split_equals(argv: list[str]) -> list[str]:
    """`--a=b` as `--a b`, for --config and --accelerate_config, which are looked for by name."""
    out = []
    for item in argv:
        name, equals, value = item.partition("=")
        out += [name, value] if equals and name in ("--config", "--accelerate_config") else [item]
    return out


def _without(argv: list[str], flag: str) -> list[str]:
    if flag not in argv:
        return list(argv)
    index = argv.index(flag)
    return argv[:index] + argv[index + 2 :]


def accelerate_file(name: str) -> Path:
    """Path of a bundled config, or of the file `name`. Raises `MamaError` if it is neither."""
    if name in ACCELERATE_CONFIGS:
        return Path(str(files("mama_trl") / "accelerate_configs" / f"{name}.yaml"))
    if Path(name).is_file():
        return Path(name)
    raise MamaError(
        f"`accelerate_config` is {name!r}, neither a file nor one of {', '.join(ACCELERATE_CONFIGS)}."
    )


def launch_arguments(parser: TrainingParser, config: str, extra: list[str], argv: list[str]) -> list[str]:
    """What follows `accelerate launch`: config, its own flags, and this command as a module.

    A module, since the scripts' folder must not come first on the path: its names would hide other packages.
    """
    from accelerate.commands.launch import launch_command_parser

    path = accelerate_file(config)
    options = [option for action in launch_command_parser()._actions for option in action.option_strings]
    for item in extra:
        flag = item.partition("=")[0]
        if flag.startswith("--") and flag not in options:
            raise MamaError(
                f"neither {parser.prog} nor accelerate knows {flag}.{nearest(flag, parser.flags + options)}"
            )
    ours = _subtract(_without(argv, "--accelerate_config"), extra)
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


def hand_over(parser: TrainingParser, config: str, extra: list[str], argv: list[str]) -> int:
    """Runs this command under accelerate's launcher; returns its exit code."""
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args(launch_arguments(parser, config, extra, argv))
    try:
        launch_command(arguments)
    except subprocess.CalledProcessError as error:  # the process has said why on stderr
        return error.returncode
    except ChildFailedError as error:
        return next(iter(error.failures.values())).exitcode or 1
    return 0


# ---------------------------------------------------------------------- the run


def check_run(script_args, training_args, model_args, needs_weights: bool = True):
    """Checks before any compute; returns what to resume from (path or None).

    Raises:
        MamaError: no model, a folder without weights, adapters, or an output_dir in use.
    """
    if not model_args.model_name_or_path:
        raise MamaError("`model_name_or_path` is missing: give a model folder or a hub id.")
    check_model_source(model_args.model_name_or_path, needs_weights)
    for name in ("use_peft", "load_in_8bit", "load_in_4bit"):
        if getattr(model_args, name):
            raise MamaError(f"`{name}` is set, which is not supported yet: train the full weights without adapters.")
    resume = training_args.resume_from_checkpoint
    again = str(resume).lower() == "true"
    output = Path(training_args.output_dir)
    if str(resume).lower() == "false":
        resume = None
    if again:
        sentence = cut_off(output)
        resume = newest_whole(output) or (get_last_checkpoint(output) if output.is_dir() and not sentence else None)
        if sentence:
            logger.warning(sentence)
        elif resume is None:
            logger.warning("no checkpoint in %s yet: starting from the beginning", output)
        resume = resume and str(resume)
    elif resume is not None and not Path(resume).is_dir():
        raise MamaError(f"`resume_from_checkpoint` is {resume}, which is no folder: give a checkpoint folder, or true.")
    _check_ranks(resume, training_args)
    if resume is None and int(os.environ.get("RANK", 0)) == 0:
        # Asked to go on where nothing whole was left: what the first save left half-written is in nobody's way.
        if holds_something(output) and get_last_checkpoint(output) and not script_args.overwrite and not again:
            raise MamaError(
                f"`output_dir` is {output}, which holds an earlier run: go on with --resume_from_checkpoint true, "
                "start anew with --overwrite true, or choose another."
            )
        check_output_dir(output, script_args.overwrite or again, model_args.model_name_or_path)
    return resume


def _check_ranks(resume: Optional[str], training_args) -> None:
    """DeepSpeed loads its optimizer only on as many ranks as wrote it: said before any model is loaded."""
    state = Path(resume) / FOLDER / STATE_FILE if resume else None
    if state is None or not state.is_file() or not os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return
    written, here = json.loads(state.read_text(encoding="utf-8")).get("ranks"), int(os.environ.get("WORLD_SIZE", 1))
    if written not in (None, here):
        raise MamaError(
            f"{resume} was written by {written} processes and this run has {here}, where DeepSpeed does not load its "
            f"optimizer: start {written}, or convert it to a universal checkpoint first (see docs/distributed.md)."
        )


def model_options(training_args, model_args) -> dict:
    """What the model is loaded with, also stored as the trainer's `model_init_kwargs`."""
    options = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    training_args.model_init_kwargs = options
    return options


def train(trainer, resume, dataset_name: Optional[str]) -> None:
    """Trains, saves model, tokenizer and masks into `output_dir`, and pushes them if asked to."""
    connect(trainer)
    trainer.train(resume_from_checkpoint=resume)
    args = trainer.args
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset_name)
    if trainer.is_world_process_zero():
        print(f"model saved in {args.output_dir}", file=sys.stderr)
    trainer.end()
