"""`MamaConfig`, the one dataclass a user fills in. Knows nothing of torch."""

import re
from dataclasses import dataclass, field
from typing import Annotated, Optional

from .errors import MamaError, shown
from .fields import Count, Range, Share, check_fields

INDICATORS = ("magnitude", "activation", "sensitivity", "movement", "curvature", "reward")
STATISTICS = ("sensitivity", "movement", "reward")
BUDGETS = ("uniform", "sensitivity", "curvature", "reward")
SCOPES = ("matrix", "row", "global")
SCHEDULES = ("oneshot", "cubic", "hold")
REDISTRIBUTIONS = ("none", "mean", "bias", "least_squares")


def check_sparsity(value: float, field_name: str = "sparsity") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise MamaError(f"`{field_name}` is {shown(value)}: it is the pruned share and must lie in [0, 1): try 0.8.")
    return float(value)


def check_choice(value: str, choices: tuple, field_name: str) -> str:
    if not isinstance(value, str) or value not in choices:
        raise MamaError(f"`{field_name}` is {shown(value)}, which is unknown: use one of {', '.join(choices)}.")
    return value


def parse_pattern(pattern: str) -> Optional[tuple[int, int]]:
    """`unstructured` gives None; `2:4` gives (2, 4): of every 4 inputs, 2 are kept."""
    if pattern == "unstructured":
        return None
    match = re.fullmatch(r"([0-9]{1,6}):([0-9]{1,6})", str(pattern))
    if not match or not 0 < int(match[1]) < int(match[2]):
        raise MamaError(
            f"`pattern` is {shown(pattern)}: use unstructured, or N:M with 0 < N < M, such as 2:4 (`mama prune` also "
            "knows heads and neurons)."
        )
    return int(match[1]), int(match[2])


def parse_indicators(indicators: list[str]) -> dict[str, float]:
    """`["activation", "sensitivity=0.5"]` gives `{"activation": 1.0, "sensitivity": 0.5}`."""
    weights: dict[str, float] = {}
    for item in [indicators] if isinstance(indicators, str) else indicators:
        name, equals, weight = item.partition("=")
        check_choice(name, INDICATORS, "indicators")
        if name in weights:
            raise MamaError(f"`indicators` names {name} twice: name it once, with its weight after =.")
        try:
            weights[name] = float(weight) if equals else 1.0
        except ValueError:
            weights[name] = -1.0
        if not 0.0 < weights[name] < float("inf"):
            raise MamaError(f"`indicators` has {shown(item)}: the weight after = must be a positive number.")
    if not weights:
        raise MamaError("`indicators` is empty: name at least one, such as activation.")
    return weights


def check_position(value: float, field_name: str) -> None:
    """A place in a run: a fraction below 1, or a whole step."""
    if value >= 1 and value != int(value):
        raise MamaError(f"`{field_name}` is {shown(value)}: use a fraction of the run below 1, or a whole step.")


def check_expression(expression: str, field_name: str) -> None:
    """Raises `MamaError` if `expression` is no regular expression, or is empty and would match every name."""
    try:
        re.compile(expression)
    except (re.error, RecursionError, OverflowError) as error:
        raise MamaError(f"`{field_name}` has {shown(expression)}, not a regular expression: {error}.") from None
    if not expression:
        raise MamaError(f"`{field_name}` has an empty expression, which matches every name: name modules such as mlp.")


@dataclass
class MamaConfig:
    """What to prune, when, by which indicators, and what to remember.

    Shared word for word by `MamaGRPOConfig` and `MamaDistillationConfig`, which inherit these fields.
    Raises `MamaError` at construction when a value makes no sense.
    """

    sparsity: float = field(
        default=0.5,
        metadata={"help": "Pruned share of the prunable connections, in [0, 1). 0 only records trajectories."},
    )
    pattern: str = field(
        default="unstructured",
        metadata={"help": "`unstructured`, or N:M such as 2:4 (of every M inputs N are kept; sets the sparsity)."},
    )
    scope: str = field(
        default="matrix",
        metadata={"help": "Where connections compete: within a `matrix`, within each output `row`, or `global`."},
    )
    indicators: list[str] = field(
        default_factory=lambda: ["activation"],
        metadata={
            "help": "Which connection to keep: magnitude, activation (magnitude times input norm), sensitivity, "
            "movement, curvature, reward; `name=weight` weighs one against the others."
        },
    )
    budget: str = field(
        default="sensitivity",
        metadata={
            "help": "How the sparsity is shared among matrices: uniform, or by sensitivity, curvature or reward "
            "where that was recorded."
        },
    )
    budget_blend: Share = field(
        default=0.3,
        metadata={"help": "Share of the non-uniform budget, blended with uniform; 0 is uniform."},
    )
    mask_schedule: str = field(
        default="oneshot",
        metadata={"help": "`oneshot` (one mask at mask_start), `cubic` ramp, or `hold` (keep the masks there are)."},
    )
    mask_start: Annotated[float, Range(0)] = field(
        default=0.1,
        metadata={"help": "First mask update: a fraction of all optimizer steps if below 1, else a step."},
    )
    mask_end: Annotated[float, Range(0)] = field(
        default=0.5,
        metadata={"help": "Last mask update of the cubic ramp: a fraction if below 1, else a step."},
    )
    mask_interval: Count = field(default=10, metadata={"help": "Optimizer steps between mask updates of the ramp."})
    redistribution: str = field(
        default="least_squares",
        metadata={"help": "How pruned values move to kept connections: none, mean, bias or least_squares."},
    )
    calibration_tokens: Count = field(
        default=16384,
        metadata={"help": "Tokens of recent training batches that input norms and grams are taken from."},
    )
    statistics: list[str] = field(
        default_factory=lambda: ["sensitivity"],
        metadata={
            "help": "Trajectory statistics kept per parameter, 2 bytes each: sensitivity (mean |w*g|), movement "
            "(-sum w*g), reward (root mean square of w*g of the GRPO loss)."
        },
    )
    target_modules: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Regular expressions of module names to prune; default: every linear layer in a block."},
    )
    exclude_modules: Optional[list[str]] = field(
        default=None, metadata={"help": "Regular expressions of module names never to prune."}
    )
    inherit_masks: bool = field(
        default=True,
        metadata={"help": "Take up masks and statistics saved beside the model by an earlier stage."},
    )

    @property
    def needs_calibration(self) -> bool:
        """Whether a mask update reads inputs of the layers."""
        return "activation" in parse_indicators(self.indicators) or self.redistribution != "none"

    def __post_init__(self):
        check_fields(self, MamaConfig)
        self.sparsity = check_sparsity(self.sparsity)
        group = parse_pattern(self.pattern)
        if group and self.sparsity > 0:
            self.sparsity = 1.0 - group[0] / group[1]
        check_choice(self.scope, SCOPES, "scope")
        parse_indicators(self.indicators)
        check_choice(self.budget, BUDGETS, "budget")
        check_choice(self.mask_schedule, SCHEDULES, "mask_schedule")
        check_choice(self.redistribution, REDISTRIBUTIONS, "redistribution")
        if self.scope == "global" and self.sparsity > 0 and self.needs_calibration:
            raise MamaError(
                "`scope` is 'global', which needs all scores at once: set `redistribution` to none and leave activation"
                " out of `indicators`, or use scope matrix with budget sensitivity, which shares the sparsity among the"
                " matrices too."
            )
        for name in self.statistics:
            check_choice(name, STATISTICS, "statistics")
        for name in ("mask_start", "mask_end"):
            check_position(getattr(self, name), name)
        # A fraction and a step cannot be compared before the run's length is known.
        if (self.mask_start < 1) == (self.mask_end < 1) and self.mask_end < self.mask_start:
            if self.mask_schedule == "cubic":
                raise MamaError(
                    f"`mask_end` is {self.mask_end!r}, before `mask_start` ({self.mask_start!r}): let the ramp end "
                    "later."
                )
        for name in ("target_modules", "exclude_modules"):
            for expression in getattr(self, name) or []:
                check_expression(expression, name)
