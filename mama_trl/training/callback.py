"""`MamaCallback`: the Trainer's events, handed to what records (state.py), prunes (regimes.py) and is saved.

Add it to a plain `transformers.Trainer` or to any TRL trainer; nothing else changes:

    trainer = SFTTrainer(model, args=args, train_dataset=data, callbacks=[MamaCallback(MamaConfig(sparsity=0.9))])
"""

import logging
from pathlib import Path
from typing import Callable, Optional

import torch
from transformers import TrainerCallback

from ..config import MamaConfig
from ..engines import ranks
from ..engines.detect import unwrap
from ..engines.zero import hook_steps
from ..errors import MamaError
from ..indicators.trajectory import Trajectory
from ..masks.maskset import MaskSet
from ..model.sequences import Sequences, check_sequences
from .card import CardFacts, write_card
from .checkpoints import cut_off
from .checks import check_saveable, check_trainer
from .persistence import beside, check_limit, forget_best, resumed_from
from .regimes import HardMasks, Regime
from .state import RunState

logger = logging.getLogger(__name__)
HISTORY_POINTS = 40  # how often a stage writes down its sample of connections


class MamaCallback(TrainerCallback):
    """Records trajectories, computes masks on a schedule, and keeps pruned connections at exactly 0.0.

    Masks and statistics are saved in `mama/` within every checkpoint and, at the end, within `output_dir`;
    they are restored on resume, and taken up by the next stage that trains a model saved beside them.

    Args:
        config: what to prune and when.
        calibration: token ids, int64 (n, sequence_length) or 1-D tensors of any lengths, for input norms and grams.
            Default: the training batches seen just before the mask update.
        stage: name of this stage in the trajectory's history.
        regime: how the run becomes sparse; made when training begins, of the run's state, its number of steps and
            `calibration`.

    `run` (the run's state) and `regime` are there once training has begun.

    Raises (at construction, its own or the trainer's that it is given to):
        MamaError: `calibration_tokens` beside `calibration`, which would have no effect; nothing to prune, adapters, or
            anything else in checks.py.
    Raises (at the start of training):
        MamaError: an unsupported engine, masks of another model.
    """

    recorded_statistics: Optional[tuple[str, ...]] = None  # those that this stage records; None = all it keeps

    def __init__(
        self, config: Optional[MamaConfig] = None, calibration: Optional[Sequences] = None, stage: str = "train",
        regime: Callable[..., Regime] = HardMasks,
    ):
        self.config = config if config is not None else MamaConfig()
        if calibration is not None and self.config.calibration_tokens is not None:
            raise MamaError(
                f"`calibration_tokens` is {self.config.calibration_tokens!r}, but `calibration` is given, so no tokens "
                "of batches are kept: leave one of them out."
            )
        check_sequences(calibration)
        self.calibration = calibration
        self.stage = stage
        self.run: Optional[RunState] = None
        self.regime: Optional[Regime] = None
        self._new_regime = regime
        self._unhook: list[Callable[[], None]] = []  # under an engine whose steps the Trainer's events do not see
        self._history_every = 1
        self._facts = CardFacts()

    # ------------------------------------------------------------------ events

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if model is not None:
            check_trainer(args, model, self.config, self.calibration)
        sentence = cut_off(args.output_dir)
        if sentence and args.should_save:
            logger.warning(sentence)

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self._release_hooks()
        check_limit(args)
        check_saveable(unwrap(model))
        self.run = RunState(model, self.config, self.stage)
        if state.global_step > 0:
            self.run.restore(resumed_from(args, state), args.output_dir)
        elif self.config.inherit_masks:
            self.run.inherit(beside(self.run.model))
        self.regime = self._new_regime(self.run, state.max_steps, self.calibration)
        self._history_every = max(1, state.max_steps // HISTORY_POINTS)
        self._unhook = hook_steps(optimizer, self._before_step, self.regime.after_step)
        if state.global_step == 0:
            self.run.sample(0)
        self._watch_inputs(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._forget_best(state)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._unhook:
            self._before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if not self._unhook:
            self.regime.after_step()

    @torch.no_grad()
    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        step = state.global_step
        if self.regime.end_step(step, optimizer):
            self.on_masks_updated(step)
        if step % self._history_every == 0:
            self.run.sample(step)
        self._watch_inputs(step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or self.run is None:
            return
        logs.update(self.metrics())
        # The Trainer copied its logs into the history before this event.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(self.metrics())

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self._facts.take(args, state, metrics)

    def on_save(self, args, state, control, **kwargs):
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._forget_best(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._release_hooks()
        self.regime.finish()
        self.run.inputs.stop()
        self.save(args.output_dir)

    def on_push_begin(self, args, state, control, **kwargs):
        # Only the main process comes here: where ranks share the masks, what the last save wrote is pushed.
        if args.should_save and self.run is not None:
            if ranks.everyone() is None:
                self.save(args.output_dir)
            write_card(args.output_dir, self.card())

    # ------------------------------------------------------------------ what users call

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
        """Sparsity of the masks now; 0.0 before the first mask update."""
        return self.run.sparsity if self.run is not None else 0.0

    def metrics(self) -> dict[str, float]:
        """`mama/sparsity`, and `mama/skipped_steps` where a gradient held NaN or infinity."""
        numbers = {"mama/sparsity": round(self.sparsity, 6)}
        skipped = int(self.run.trajectory.skipped) if self.run is not None else 0
        if skipped:
            numbers["mama/skipped_steps"] = skipped
        return numbers

    def save(self, folder: str | Path) -> None:
        """Writes masks, statistics and the run's state into `folder/mama/`; nothing before training. Collective."""
        if self.run is not None:
            self.run.save(folder)

    def card(self) -> dict:
        """What the model card tells: sparsity, pattern, how it was pruned, and the last evaluation's numbers."""
        return self._facts.of(self.config, self.sparsity, self.stage)

    def on_masks_updated(self, step: int) -> None:
        """Called after every mask update; a trainer that samples from a copy of the model syncs it here."""

    # ------------------------------------------------------------------ inside

    def _before_step(self) -> None:
        self.run.trajectory.record(self.recorded_statistics)
        self.regime.before_step()

    def _release_hooks(self) -> None:
        for undo in self._unhook:
            undo()
        self._unhook = []

    def _watch_inputs(self, step: int) -> None:
        """Captures inputs only before a mask update that will need them."""
        wanted = step < self.regime.last and self.calibration is None and self.config.needs_calibration
        self.run.inputs.start() if wanted else self.run.inputs.stop()

    def _forget_best(self, state) -> None:
        if self.regime is not None and state.global_step < self.regime.last:
            forget_best(state)
