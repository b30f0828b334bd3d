"""The ways to prune that tables compare: the product's methods as they come, and controls that are not of it."""

from dataclasses import dataclass, replace

from benchmarks.composite import COMPOSITE
from mama_trl.report.plots import METHOD_COLOURS
from mama_trl.solvers.methods import METHODS


@dataclass(frozen=True)
class Way:
    """`options` are those of `prune`; `colour` is its line's in plots."""

    label: str
    colour: str
    options: dict


WAYS = {name: Way(method.label, METHOD_COLOURS[name], {"method": name}) for name, method in METHODS.items()}
WAYS["alps_budget"] = Way(
    "ALPS with MAMA's budget", "tab:olive", {"method": replace(METHODS["alps"], budget="predicted")}
)
WAYS["composite"] = Way("composite of public ideas", "tab:brown", {"method": COMPOSITE})
WAYS["mama_refined"] = Way("MAMA refined", "black", {"method": "mama", "refine": True})
