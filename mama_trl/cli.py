"""`mama`: the command line. Knows only names; each command's module is imported when it is called."""

import difflib
import os
import sys
from importlib import import_module

from .errors import MamaError

TRAINING = {
    "pretrain": "train a model from scratch (or go on pre-training) on text, recording trajectories",
    "sft": "supervised fine-tuning, recording trajectories and pruning on a schedule",
    "grpo": "reinforcement learning with a checkable reward that says which connections matter",
    "distill": "teach a pruned model what the dense one knows",
}
WITHOUT_TRAINING = {
    "prune": "prune a saved model in one shot",
    "evaluate": "perplexity, sparsity and size of a saved model",
    "levels": "compare pruning methods at several sparsities",
    "ablation": "compare MAMA with one of its parts changed at a time",
    "report": "rebuild the HTML report of a finished run",
    "run": "the whole way from a recipe: pre-train, fine-tune, GRPO, distil, evaluate, report",
}
COMMANDS = {**TRAINING, **WITHOUT_TRAINING}


def overview() -> str:
    """What `mama --help` prints."""
    lines = ["usage: mama COMMAND [options]", "", "Prune language models while they train.", ""]
    for heading, commands in (("training", TRAINING), ("without training", WITHOUT_TRAINING)):
        lines += [f"{heading}:"] + [f"  {name:<10} {text}" for name, text in commands.items()] + [""]
    lines += [
        "mama COMMAND --help explains a command. To see the whole method at work:",
        "  mama run configs/demo.yaml",
    ]
    return "\n".join(lines)


def dispatch(argv: list[str]) -> int:
    """Runs the command that `argv` names; returns its exit code. Raises `MamaError` on bad input."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        from . import __version__

        print(f"mama_trl {__version__}")
        return 0
    name = argv[0]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `mama {near[0]}`?" if near else f"use one of {', '.join(COMMANDS)}."
        raise MamaError(f"`{name}` is no command: {hint}")
    return import_module(f".scripts.{name}", __package__).run(argv[1:]) or 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script and of the launchers: bad input becomes one line and exit code 2."""
    try:
        return dispatch(list(sys.argv[1:] if argv is None else argv))
    except MamaError as error:
        return _say(str(error), 2)
    except KeyboardInterrupt:
        return _say("stopped", 130)
    except BrokenPipeError:
        # The reader (a pager, head) went away; nothing is left to say, and Python must not flush into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        from .disk.machine import refusal_of
        from .errors import one_line

        sentence = refusal_of(error)
        if sentence is None:
            raise
        return _say(one_line(sentence), 2)


def _say(sentence: str, code: int) -> int:
    """Prints a last sentence on a line of its own, beneath the progress bars; returns `code`."""
    bars = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(bars, "_instances", ())):
        bar.close()
    print(f"mama: {sentence}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
