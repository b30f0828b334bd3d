"""What a trainer that stands in for another owes it: its signature, its configs, its default folder."""

import copy
import functools
import inspect
from dataclasses import MISSING, fields
from typing import Callable

from transformers import TrainingArguments

from ..config import MamaConfig
from ..errors import MamaError


def signature_of(parent: type) -> Callable:
    """Decorator of an `__init__(self, arguments, *, ours...)`: it is called like `parent`, in the same order and with
    the same defaults, whatever version of it is installed; our own arguments are keyword-only behind.

    `arguments` are those of the parent, by name.
    """
    theirs = inspect.signature(parent.__init__)

    def decorate(init: Callable) -> Callable:
        ours = {p.name: p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY}

        @functools.wraps(init)
        def called(self, *args, **kwargs):
            own = {name: kwargs.pop(name) for name in list(kwargs) if name in ours}
            bound = theirs.bind(self, *args, **kwargs)
            bound.apply_defaults()
            arguments = dict(bound.arguments)
            del arguments[next(iter(theirs.parameters))]
            init(self, arguments, **own)

        shown = [*theirs.parameters.values(), *ours.values()]
        called.__signature__ = theirs.replace(parameters=shown)
        return called

    return decorate


def config_for(args, model, ours: type, parent: type, suffix: str):
    """`args` as our config, made the way `parent`'s own trainer would: its default folder where there is none.

    A plain config of the parent is taken over as it stands, with our defaults for what it lacks.

    Raises:
        MamaError: `args` is something else.
    """
    if args is None:
        name = model if isinstance(model, str) else getattr(getattr(model, "config", None), "_name_or_path", "")
        return ours(output_dir=f"{name.split('/')[-1]}-{suffix}")
    if isinstance(args, ours):
        return args
    if not isinstance(args, parent):
        raise MamaError(
            f"`args` is a {type(args).__name__}: this trainer takes a {ours.__name__}, or a {parent.__name__} with its "
            "defaults for the rest."
        )
    taken = copy.copy(args)
    taken.__class__ = ours
    for option in fields(ours):
        if not hasattr(args, option.name):
            made = option.default_factory is not MISSING
            setattr(taken, option.name, option.default_factory() if made else option.default)
    MamaConfig.__post_init__(taken)
    return taken


def from_training_arguments(args: TrainingArguments, parent: type):
    """A plain `TrainingArguments` as `parent`'s config, as `SFTTrainer` does it; anything else as it is."""
    if not isinstance(args, TrainingArguments) or isinstance(args, parent):
        return args
    if type(args) is not TrainingArguments and not issubclass(parent, type(args)):
        return args  # another trainer's config
    return parent(**{**args.to_dict(), "hub_token": args.hub_token})
