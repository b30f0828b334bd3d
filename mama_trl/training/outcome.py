"""Whether a run came to the sparsity that it was asked for."""

from typing import Optional

from .regimes import Regime
from .state import RunState


def shortfall(run: RunState, regime: Regime) -> float:
    """How much of the sparsity asked for is missing in the weights, as they were counted last; 0.0 if none is."""
    missing = regime.target - run.sparsity
    return missing if missing > run.rounding else 0.0


def sentence(run: RunState, regime: Regime) -> Optional[str]:
    """What to say of a run that ends below its sparsity; None if it does not."""
    if not shortfall(run, regime):
        return None
    why = (
        "no mask was computed" if run.masks is None
        else "its last mask update never came" if regime.pending(run.mask_step)
        else "weights under its masks are not zero"
    )
    more = f"let it take more steps (the last update is at step {regime.last}), or " if regime.last else ""
    return (
        f"the run ends at sparsity {run.sparsity:.4f} instead of {regime.target:.4f} ({why}): {more}prune what it "
        "saved with `mama prune`."
    )


def metrics(run: Optional[RunState], regime: Optional[Regime]) -> dict[str, float]:
    """What is logged: sparsity counted in the weights, that of the masks, steps left out, and what is missing in the
    end."""
    if run is None:
        return {"mama/sparsity": 0.0}
    numbers = {"mama/sparsity": round(run.sparsity, 6)}
    if run.masks is not None:
        numbers["mama/mask_sparsity"] = round(run.mask_sparsity, 6)
    skipped = int(run.trajectory.skipped)
    if skipped:
        numbers["mama/skipped_steps"] = skipped
    if run.ended and regime is not None and shortfall(run, regime):
        numbers["mama/sparsity_missed"] = round(shortfall(run, regime), 6)
    return numbers
