"""The parser of the training commands: trainer, model and data arguments, YAML recipes, help."""

import argparse
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Callable, Iterator, Optional

from transformers.utils import is_torch_bf16_gpu_available
from trl import ScriptArguments, TrlParser

from ..config import MamaConfig
from ..disk.paths import check_paths
from ..disk.yaml_files import read_settings
from ..errors import MamaError, shown
from ..fields import check_mapping, nearest
from ..training.settings import RANGES, check_values, refusals_of
from .launch import ACCELERATE_CONFIGS, accelerate_file, hand_over, without
from .parser import actions_of

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
        by_name = {action.dest: action for action in reversed(actions_of(self))}  # --x, not its later twin --no_x
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
        return [option for action in actions_of(self) for option in action.option_strings]


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
    environment = _environment(recipe.pop("env", None))
    plain, _ = parser.parse_known_args([])
    with _defaults(parser, _checked(parser, recipe)):
        namespace, unknown = parser.parse_known_args(without(argv, "--config"))
    given = argparse.Namespace(**{name: v for name, v in vars(namespace).items() if v != getattr(plain, name)})
    for cls in parser.dataclass_types:
        check_values(given, cls)
    vars(namespace).update(vars(given))
    # What only shows in several values together, before processes are started.
    MamaConfig(**{option.name: getattr(namespace, option.name) for option in fields(MamaConfig)})
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    if namespace.accelerate_config and not launched:
        engines_own = {"the engine's config": accelerate_file(namespace.accelerate_config)}
        check_paths([namespace.output_dir], engines_own, beside=engines_own)
        code = hand_over(parser, namespace.accelerate_config, unknown, argv)
        if code:
            raise SystemExit(code)
        return None
    for flag in unknown:
        raise MamaError(f"{parser.prog} does not know {shown(flag)}.{nearest(flag, parser.flags)}")
    os.environ.update(environment)
    return _remember(_filled(parser, namespace), argv)


def _checked(parser: TrainingParser, recipe: dict) -> dict:
    """The settings of a config file, each as its field wants it. Raises `MamaError`."""
    known = {action.dest for action in actions_of(parser)}
    checked = {}
    for name, value in recipe.items():
        if name not in known:
            hint = nearest(name, known)
            raise MamaError(f"the config file has {shown(name)}, which {parser.prog} does not know.{hint}")
        cls = next((cls for cls in parser.dataclass_types if name in {f.name for f in fields(cls)}), None)
        checked |= check_mapping({name: value}, cls, "the config file", RANGES) if cls else {name: value}
    return checked


def _environment(values: object) -> dict[str, str]:
    """What `env:` of a config file sets. Raises `MamaError` if it is no mapping of names to words."""
    if values is None:
        return {}
    plain = isinstance(values, dict) and all(
        isinstance(name, str) and isinstance(value, (str, int, float)) for name, value in values.items()
    )
    if not plain or any("\0" in f"{name}{value}" or "=" in name or not name for name, value in values.items()):
        raise MamaError(f"`env` is {shown(values)}: write one `NAME: value` a line.")
    return {name: str(value) for name, value in values.items()}


@contextmanager
def _defaults(parser: TrainingParser, values: dict) -> Iterator[None]:
    """The parser with other defaults for the time being."""
    before = [(action, action.default, action.required) for action in actions_of(parser)]
    try:
        parser.set_defaults_with_config(**values)
        yield
    finally:
        for action, default, required in before:
            action.default, action.required = default, required


def _filled(parser: TrainingParser, namespace: argparse.Namespace) -> tuple:
    """The parser's dataclasses with the values of `namespace`. Raises `MamaError` for what they refuse."""
    values, filled = vars(namespace), []
    for cls in parser.dataclass_types:
        own = {declared.name: values.pop(declared.name) for declared in fields(cls) if declared.name in values}
        with refusals_of(cls.__name__):
            filled.append(cls(**own))
    return tuple(filled)


def _remember(filled: tuple, argv: list[str]) -> tuple:
    """Notes in the command's own arguments which file the settings came from: it is not to be written over."""
    for part in filled:
        if isinstance(part, TrainingArguments) and "--config" in argv:
            part.config_file = argv[argv.index("--config") + 1]
    return filled


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
    return read_settings(argv[index], f"--config {argv[index]}")


def _split_equals(argv: list[str]) -> list[str]:
    """`--a=b` as `--a b`, for --config and --accelerate_config, which are looked for by name."""
    out = []
    for item in argv:
        name, equals, value = item.partition("=")
        out += [name, value] if equals and name in ("--config", "--accelerate_config") else [item]
    return out
