"""`RunView`: the part of `MamaCallback` that tells of the run, to users, logs and model cards."""

from pathlib import Path
from typing import Optional

from transformers import TrainerCallback

from ..config import MamaConfig
from ..engines import ranks
from ..engines.detect import unwrap
from ..indicators.trajectory import Trajectory
from ..masks.maskset import MaskSet
from . import outcome
from .card import CardFacts, write_card
from .finished import Standstill
from .regimes import Regime
from .state import RunState


class RunView(TrainerCallback):
    """Masks, statistics and numbers of a run; before training begins there is nothing to tell.

    Args:
        config: what was asked for.
        stage: name of the stage in the trajectory's history.
    """

    def __init__(self, config: MamaConfig, stage: str):
        self.config, self.stage = config, stage
        self.run: Optional[RunState] = None
        self.regime: Optional[Regime] = None
        self._facts = CardFacts()
        self._still: Optional[Standstill] = None  # of a run with nothing left to do

    # ------------------------------------------------------------------ events that tell

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if logs is None or not self.is_of(model):
            return
        # The Trainer copied its logs into the history before this event.
        history = state.log_history[-1:]
        for written in [logs, *(row for row in history if row.get("step") == state.global_step)]:
            written.update(self.metrics())
            if self._still:
                self._still.correct(written)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._facts.take(args, state, metrics)

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        # Only the main process comes here: where ranks share the masks, what the last save wrote is pushed.
        if args.should_save and self.is_of(model):
            if ranks.everyone() is None:
                self.save(args.output_dir)
            write_card(args.output_dir, self.card())

    # ------------------------------------------------------------------ what users ask

    @property
    def masks(self) -> Optional[MaskSet]:
        """The masks now; None before the first."""
        return self.run.masks if self.run is not None else None

    @property
    def trajectory(self) -> Optional[Trajectory]:
        """The statistics of the run; None before training begins."""
        return self.run.trajectory if self.run is not None else None

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that are exactly zero, as counted at the last mask update, log or save."""
        return self.run.sparsity if self.run is not None else 0.0

    @property
    def missed(self) -> Optional[str]:
        """A sentence if the run has come to its end with weights that are less sparse than was asked for."""
        return outcome.sentence(self.run, self.regime) if self.run is not None and self.run.ended else None

    def metrics(self) -> dict[str, float]:
        """`mama/sparsity` and, of the masks, `mama/mask_sparsity`; `mama/skipped_steps` where a gradient held NaN or
        infinity, and `mama/sparsity_missed` where a run has come to its end below its sparsity."""
        return outcome.metrics(self.run, self.regime)

    def card(self) -> dict:
        """What the model card tells: sparsity, pattern, how it was pruned, and the last evaluation's numbers."""
        return self._facts.of(self.config, self.sparsity, self.stage, self.missed)

    def save(self, folder: str | Path) -> None:
        """Writes masks, statistics and the run's state into `folder/mama/`; nothing before training. Collective."""
        if self.run is not None:
            self.run.save(folder)

    def is_of(self, model) -> bool:
        """Whether `model` is the one of this run: a Trainer may log and evaluate before it trains."""
        return self.run is not None and (model is None or unwrap(model) is self.run.model)
