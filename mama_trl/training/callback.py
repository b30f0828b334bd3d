"""`MamaCallback`: the Trainer's events, handed to what records (state.py), prunes (regimes.py) and is saved.

Add it to a plain `transformers.Trainer` or to any TRL trainer; nothing else changes:

    trainer = SFTTrainer(model, args=args, train_dataset=data, callbacks=[MamaCallback(MamaConfig(sparsity=0.9))])
"""

import logging
from pathlib import Path
from typing import Callable, Optional

import torch

from ..config import MamaConfig
from ..engines import ranks
from ..engines.detect import unwrap
from ..engines.zero import hook_steps
from ..errors import MamaError
from ..model.sequences import Sequences, check_sequences
from .alone import refuse_second
from .card import CardFacts
from .checkpoints import cut_off, let_go_first
from .checks import check_saveable, check_trainer
from .finished import Standstill, is_finished
from .health import check_finite
from .identity import identity
from .persistence import beside, check_limit, forget_best, resumed_from
from .regimes import HardMasks, Regime
from .state import RunState
from .view import RunView

logger = logging.getLogger(__name__)
HISTORY_POINTS = 40  # how often a stage writes down its sample of connections


class MamaCallback(RunView):
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

    `run` (the run's state) and `regime` are there once training has begun; what else it tells is in view.py.

    Raises (at construction, its own or the trainer's that it is given to):
        MamaError: `calibration_tokens` beside `calibration`, which would have no effect; nothing to prune, adapters, or
            anything else in checks.py.
    Raises (at the start of training):
        MamaError: an unsupported engine, masks of other weights, another run's checkpoint, a second MamaCallback.
    Raises (while training):
        MamaError: a weight is NaN or infinite, when it would be logged or saved.
    """

    recorded_statistics: Optional[tuple[str, ...]] = None  # those that this stage records; None = all it keeps

    def __init__(
        self, config: Optional[MamaConfig] = None, calibration: Optional[Sequences] = None, stage: str = "train",
        regime: Callable[..., Regime] = HardMasks,
    ):
        super().__init__(config if config is not None else MamaConfig(), stage)
        if calibration is not None and self.config.calibration_tokens is not None:
            raise MamaError(
                f"`calibration_tokens` is {self.config.calibration_tokens!r}, but `calibration` is given, so no tokens "
                "of batches are kept: leave one of them out."
            )
        check_sequences(calibration)
        self.calibration = calibration
        self._new_regime = regime
        self._unhook: list[Callable[[], None]] = []  # under an engine whose steps the Trainer's events do not see
        self._looked = 0  # step after which the weights were last looked at
        self._history_every = 1

    # ------------------------------------------------------------------ events

    def on_init_end(self, args, state, control, model=None, **kwargs):
        refuse_second(state, "init")
        if model is not None:
            check_trainer(args, model, self.config, self.calibration)
        sentence = cut_off(args.output_dir, hashes=False) if args.should_save else None
        if sentence:
            logger.warning(sentence)

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs):
        refuse_second(state, "train")
        self._release()
        check_limit(args)
        check_saveable(unwrap(model))
        self._facts = CardFacts()
        self.run = run = RunState(model, self.config, self.stage)
        run.identity = ranks.decided(lambda: identity(args, self.config, self.stage, run.model, train_dataloader))
        if state.global_step > 0:
            run.restore(resumed_from(args, state), args.output_dir)
        else:
            run.inherit(beside(run.model))
        self.regime = self._new_regime(run, state.max_steps, self.calibration)
        self._history_every, self._looked = max(1, state.max_steps // HISTORY_POINTS), state.global_step
        if args.should_save:
            let_go_first(args.output_dir)
        if is_finished(state) and not self.regime.pending(state.global_step):
            self._still = Standstill(state, optimizer, args.should_save)
            return
        self._unhook = hook_steps(optimizer, self._before_step, self.regime.after_step)
        if state.global_step == 0:
            run.sample(0)
        self._watch_inputs(state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._forget_best(state)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._unhook and not self._still:
            self._before_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if not self._unhook and not self._still:
            self.regime.after_step()

    @torch.no_grad()
    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        if self._still:
            return self._still.undo(state, control)
        step = state.global_step
        changed = self.regime.end_step(step, optimizer)
        if changed:
            self.on_masks_updated(step)
        if step % self._history_every == 0:
            self.run.sample(step)
        self._watch_inputs(step)
        self._look(args, state, control, changed)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._still.undo(state, control) if self._still else self._look(args, state, control)

    @torch.no_grad()
    def on_save(self, args, state, control, **kwargs):
        if self._looked != state.global_step:  # whoever asked for this save did so behind this callback
            check_finite(self.run.parameters, state.global_step, args.output_dir)
        self.run.save(Path(args.output_dir) / f"checkpoint-{state.global_step}", True, step=state.global_step)
        self._forget_best(state)

    @torch.no_grad()
    def on_train_end(self, args, state, control, **kwargs):
        self._release()
        self.regime.finish()
        check_finite(self.run.parameters, state.global_step, args.output_dir)
        self.run.ended = True
        self.run.save(args.output_dir, step=state.global_step)
        self.run.leave(args.output_dir)
        if self.missed is not None and args.should_save:
            logger.warning(self.missed)
            state.log_history.append({"step": state.global_step, **self.metrics()})

    def on_masks_updated(self, step: int) -> None:
        """Called after every mask update; a trainer that samples from a copy of the model syncs it here."""

    # ------------------------------------------------------------------ inside

    def _before_step(self) -> None:
        self.run.trajectory.record(self.recorded_statistics)
        self.regime.before_step()

    def _look(self, args, state, control, changed: bool = False) -> None:
        """Counts the zeros, and stops a run whose weights are no numbers, before anything is logged or saved."""
        ends = control.should_training_stop or state.global_step >= state.max_steps
        asked = control.should_log or control.should_save or ends
        if changed or asked and self._looked != state.global_step:
            self._looked = state.global_step
            check_finite(self.run.parameters, state.global_step, args.output_dir)
            self.run.count()
            self.run.ended = ends

    def _release(self) -> None:
        for undo in self._unhook:
            undo()
        if self._still is not None:
            self._still.release()
        if self.run is not None:
            self.run.inputs.stop()
        self._unhook, self._still = [], None

    def _watch_inputs(self, step: int) -> None:
        """Captures inputs only before a mask update that will need them."""
        wanted = self.regime.pending(step) and self.calibration is None and self.config.needs_calibration
        self.run.inputs.start() if wanted else self.run.inputs.stop()

    def _forget_best(self, state) -> None:
        if self.regime is not None and self.regime.pending(state.global_step):
            forget_best(state)
