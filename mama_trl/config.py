"""`PruningOptions` (what to prune, and how) and `MamaConfig` (when, in a training run): every option is declared here.

Flags of the commands, parameters of `prune`, and recipes derive from these fields. Knows nothing of torch.
"""

import re
from dataclasses import dataclass, field, fields
from typing import Annotated, ClassVar, Iterable, Optional

from .errors import MamaError, shown
from .fields import Count, Range, check_fields

INDICATORS = {  # name: what it is
    "magnitude": "|w|",
    "activation": "magnitude times input norm",
    "sensitivity": "mean |w g| over steps",
    "movement": "away from zero, -sum w g",
    "curvature": "w² √v of Adam's second moment",
    "reward": "root mean square of w g of the GRPO loss",
}
READS_INPUTS = {"activation"}  # indicators that follow from a layer's inputs
STATISTICS = {  # name: what a training run records of each connection
    "sensitivity": "mean |w*g|",
    "movement": "-sum w*g",
    "reward": "root mean square of w*g of the GRPO loss",
}
RECORDED_BUDGETS = ("sensitivity", "curvature", "reward")  # what a training run records, or its optimizer keeps
ONE_SHOT_BUDGETS = ("predicted", "measured")  # passes over the dense model
BUDGETS = ("uniform", *ONE_SHOT_BUDGETS, *RECORDED_BUDGETS)
SCOPES = ("matrix", "row", "global")
SCHEDULES = {  # name: when masks are computed; all but oneshot and hold are ramps (training/schedule.py)
    "oneshot": "one mask at mask_start",
    "cubic": "a ramp from mask_start to mask_end, steep at first",
    "hold": "keep the masks there are",
}
REDISTRIBUTIONS = {  # name: where pruned values go
    "none": "nowhere",
    "mean": "evenly to the kept connections of their row",
    "bias": "their mean output into the bias",
    "least_squares": "kept values that lose least of the layer's outputs, found together with the mask",
}


RECORDED_BLEND = 0.3  # share of a recorded budget's own allocation, the rest uniform


def check_sparsity(value: float, field_name: str = "sparsity") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < 1.0:
        raise MamaError(f"`{field_name}` is {shown(value)}: it is the pruned share and must lie in [0, 1): try 0.8.")
    return float(value)


def check_choice(value: str, choices: Iterable[str], field_name: str) -> str:
    if not isinstance(value, str) or value not in list(choices):
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
    """Raises `MamaError` if `value` is no place in a run: a fraction below 1, or a whole step."""
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
class PruningOptions:
    """What to prune, by which score, and where the pruned values go.

    `None` stands for a default that follows from other fields, so that an option that would have no effect can be
    told from one that was not given: the former is refused.

    Raises:
        MamaError: a value makes no sense, or two exclude each other.
    """

    sparsity: float = field(
        default=0.5,
        metadata={"help": "Pruned share of the prunable connections, in [0, 1)."},
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
            "help": "Which connection to keep: "
            + "; ".join(f"{name} ({what})" for name, what in INDICATORS.items())
            + ". `name=weight` weighs one against the others."
        },
    )
    budget: Optional[str] = field(
        default=None,
        metadata={
            "help": "Allocation, how the sparsity is shared among matrices: uniform; predicted (by what losing each "
            "connection would cost, from a few calibration sequences, one-shot only); measured (each matrix pruned "
            "alone at six sparsities: many times as long, one-shot only); sensitivity, curvature or reward, "
            " as training recorded them. Default: predicted in one-shot pruning by mama, sensitivity in "
            "training, reward in GRPO, and uniform with N:M and scope global."
        },
    )
    budget_blend: Annotated[Optional[float], Range(0, 1)] = field(
        default=None,
        metadata={
            "help": f"Share of the budget's own allocation, the rest uniform. Default: {RECORDED_BLEND} for what "
            "training recorded, 1 for measured; for predicted it falls with the sparsity."
        },
    )
    redistribution: str = field(
        default="least_squares",
        metadata={
            "help": "Where pruned values go: " + "; ".join(f"{name} ({what})" for name, what in REDISTRIBUTIONS.items())
            + "."
        },
    )
    refine: bool = field(
        default=False,
        metadata={
            "help": "After a block is pruned, train what it kept, its norms and biases towards the dense model's "
            "hidden states behind it, with early stopping on held-back calibration sequences: one block in memory, "
            "three to four times the time. One-shot pruning by mama only."
        },
    )
    target_modules: Optional[list[str]] = field(
        default=None,
        metadata={"help": "Regular expressions of module names to prune; default: every linear layer in a block."},
    )
    exclude_modules: Optional[list[str]] = field(
        default=None, metadata={"help": "Regular expressions of module names never to prune."}
    )

    @property
    def nm(self) -> Optional[tuple[int, int]]:
        """(N, M) of the pattern; None if it is unstructured."""
        return parse_pattern(self.pattern)

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each indicator."""
        return parse_indicators(self.indicators)

    @property
    def needs_calibration(self) -> bool:
        """Whether pruning reads inputs of the layers."""
        return bool(READS_INPUTS & set(self.weights)) or self.redistribution != "none"

    def __post_init__(self):
        check_fields(self, PruningOptions)
        self.sparsity = check_sparsity(self.sparsity)
        if self.nm and self.sparsity > 0:
            self.sparsity = 1.0 - self.nm[0] / self.nm[1]
        check_choice(self.scope, SCOPES, "scope")
        parse_indicators(self.indicators)
        check_choice(self.redistribution, REDISTRIBUTIONS, "redistribution")
        if self.budget is not None:
            check_choice(self.budget, BUDGETS, "budget")
        if self.nm and self.scope != "matrix":
            raise MamaError(
                f"`scope` is {self.scope!r}, but `pattern` {self.pattern} says already where connections compete "
                f"(within every {self.nm[1]} inputs): leave `scope` out."
            )
        for fixed, name in ((self.nm, f"pattern {self.pattern}"), (self.scope == "global", "scope global")):
            if fixed and self.budget not in (None, "uniform"):
                raise MamaError(
                    f"`budget` is {self.budget!r}, but {name} leaves no sparsity to share among matrices: leave "
                    "`budget` out."
                )
        if self.budget_blend is not None and (self.budget == "uniform" or self.nm or self.scope == "global"):
            raise MamaError(
                f"`budget_blend` is {self.budget_blend!r}, but the budget is uniform, so nothing is blended: leave it "
                "out, or name a `budget`."
            )
        if self.scope == "global" and self.sparsity > 0 and self.needs_calibration:
            raise MamaError(
                "`scope` is 'global', which needs all scores at once: set `redistribution` to none and leave activation"
                " out of `indicators`, or use scope matrix with budget sensitivity, which shares the sparsity among the"
                " matrices too."
            )
        for name in ("target_modules", "exclude_modules"):
            for expression in getattr(self, name) or []:
                check_expression(expression, name)


@dataclass
class MamaConfig(PruningOptions):
    """`PruningOptions`, when to prune in a training run, and what to remember of it.

    Inherited by `MamaGRPOConfig` and `MamaDistillationConfig`.

    Raises:
        MamaError: a value makes no sense, or would have no effect.
    """

    default_budget: ClassVar[str] = "sensitivity"
    default_statistics: ClassVar[tuple[str, ...]] = ("sensitivity",)

    sparsity: float = field(
        default=0.5,
        metadata={"help": "Pruned share of the prunable connections, in [0, 1). 0 only records trajectories."},
    )
    mask_schedule: str = field(
        default="oneshot",
        metadata={"help": "; ".join(f"`{name}` ({what})" for name, what in SCHEDULES.items()) + "."},
    )
    mask_start: Annotated[Optional[float], Range(0)] = field(
        default=None,
        metadata={
            "help": "First mask update: a fraction of all optimizer steps if below 1, else a step. Default 0.1; not "
            "for `hold`."
        },
    )
    mask_end: Annotated[Optional[float], Range(0)] = field(
        default=None,
        metadata={
            "help": "Last mask update of the cubic ramp: a fraction if below 1, else a step. Default 0.5; only for "
            "`cubic`."
        },
    )
    mask_interval: Optional[Count] = field(
        default=None,
        metadata={"help": "Optimizer steps between mask updates of the ramp. Default 10; only for `cubic`."},
    )
    calibration_tokens: Optional[Count] = field(
        default=None,
        metadata={
            "help": "Tokens of recent training batches that input norms and grams are taken from. Default 16384; only "
            "where activations or redistribution read inputs."
        },
    )
    statistics: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": "Trajectory statistics kept per parameter, 2 bytes each: "
            + ", ".join(f"{name} ({what})" for name, what in STATISTICS.items())
            + ". What `indicators` and `budget` ask for is always kept. Default: sensitivity; in GRPO reward too."
        },
    )
    inherit_masks: bool = field(
        default=True,
        metadata={"help": "Take up masks and statistics saved beside the model by an earlier stage."},
    )
    enforce_masks: bool = field(
        default=False,
        metadata={
            "help": "Set to zero what the masks taken up prune and is not zero, as right after merging an adapter, "
            "instead of refusing masks that do not fit the weights."
        },
    )

    def __post_init__(self):
        check_fields(self, MamaConfig)
        super().__post_init__()
        check_choice(self.mask_schedule, SCHEDULES, "mask_schedule")
        if self.budget in ONE_SHOT_BUDGETS:
            raise MamaError(
                f"`budget` is {self.budget!r}, passes over the dense model for one-shot pruning: in training use "
                "sensitivity, which is recorded anyway."
            )
        if self.refine:
            raise MamaError(
                "`refine` is true, which is for one-shot pruning: training refines the whole model, so leave it out."
            )
        for name in self.statistics or []:
            check_choice(name, STATISTICS, "statistics")
        self._check_schedule()
        if self.enforce_masks and not self.inherit_masks:
            raise MamaError(
                "`enforce_masks` is True, but `inherit_masks` is False, so no masks are taken up: leave one out."
            )
        if self.calibration_tokens is not None and not self.needs_calibration:
            raise MamaError(
                f"`calibration_tokens` is {self.calibration_tokens!r}, but nothing reads inputs with these "
                "`indicators` and redistribution none: leave it out."
            )

    def _check_schedule(self) -> None:
        ramps = tuple(name for name in SCHEDULES if name not in ("oneshot", "hold"))
        takes = {"mask_start": ("oneshot", *ramps), "mask_end": ramps, "mask_interval": ramps}
        for name, kinds in takes.items():
            value = getattr(self, name)
            if value is not None and self.mask_schedule not in kinds:
                raise MamaError(
                    f"`{name}` is {value!r}, but `mask_schedule` is {self.mask_schedule!r}, which has none: leave it "
                    f"out, or use mask_schedule {' or '.join(kinds)}."
                )
        for name in ("mask_start", "mask_end"):
            if getattr(self, name) is not None:
                check_position(getattr(self, name), name)
        # A fraction and a step cannot be compared before the run's length is known.
        start, end = self.start, self.end
        if self.mask_schedule in ramps and (start < 1) == (end < 1) and end < start:
            raise MamaError(f"`mask_end` is {end!r}, before `mask_start` ({start!r}): let the ramp end later.")

    # ------------------------------------------------------------------ what follows from the fields

    @property
    def start(self) -> float:
        """First mask update, a fraction or a step."""
        return 0.1 if self.mask_start is None else self.mask_start

    @property
    def end(self) -> float:
        """Last mask update of a ramp, a fraction or a step."""
        return 0.5 if self.mask_end is None else self.mask_end

    @property
    def interval(self) -> int:
        """Steps between two mask updates of a ramp."""
        return 10 if self.mask_interval is None else self.mask_interval

    @property
    def tokens(self) -> int:
        """How many tokens of recent batches are kept for calibration."""
        return 16384 if self.calibration_tokens is None else self.calibration_tokens

    @property
    def allocation(self) -> str:
        """The budget that applies."""
        return self.budget or ("uniform" if self.nm or self.scope == "global" else self.default_budget)

    @property
    def blend(self) -> float:
        """The recorded budget's share in the allocation."""
        return RECORDED_BLEND if self.budget_blend is None else self.budget_blend

    def pruning(self, sparsity: float) -> PruningOptions:
        """The options of one mask update at `sparsity`."""
        values = {f.name: getattr(self, f.name) for f in fields(PruningOptions)}
        return PruningOptions(**{**values, "sparsity": sparsity, "budget": None, "budget_blend": None})

    @property
    def recorded(self) -> list[str]:
        """The statistics to keep: those asked for, and those that indicators and the budget read."""
        asked = self.default_statistics if self.statistics is None else self.statistics
        needed = [*self.weights, self.allocation] if self.sparsity > 0 else []
        return list(dict.fromkeys([*asked, *(name for name in needed if name in STATISTICS)]))
