"""How a run becomes sparse: what is done around each optimizer step, and when masks change.

`HardMasks` computes masks on a schedule and keeps pruned connections at exactly zero. Another regime is a class with
the same methods, given to `MamaCallback(config, regime=...)`: see docs/extend.md.
"""

from typing import Optional

from torch import nn

from ..config import MamaConfig
from ..errors import MamaError
from ..indicators.history import histogram
from ..model.sequences import Sequences, own_share
from ..pruning.prune import check_redistribution
from ..pruning.update import Update, check_moments, update_masks
from .schedule import Schedule
from .state import RunState


class Regime:
    """The interface of a regime: methods in the order in which a run calls them. All of them are collective.

    Tensors that must survive a kill go into `run.regime_tensors` (what this rank owns of each parameter, by a name that
    ends in "/" and the parameter's): they are saved with each checkpoint and are there again when a resumed run begins.

    Args:
        run: masks, shards and statistics of the run; made when training begins, restored or inherited already.
        total_steps: optimizer steps of the whole run.
        calibration: token ids to calibrate on, or None for the newest training batches.
    """

    def __init__(self, run: RunState, total_steps: int, calibration: Optional[Sequences] = None):
        self.run, self.total_steps, self.calibration = run, total_steps, calibration

    @property
    def last(self) -> int:
        """The last step after which a mask changes; 0 if none does."""
        return 0

    @property
    def target(self) -> float:
        """The sparsity that the run is to end with; 0.0 if it is free."""
        return 0.0

    def pending(self, step: int) -> bool:
        """Whether masks are still to change after `step`."""
        return step < self.last

    def before_step(self) -> None:
        """The gradients of a step are complete, and the weights have not moved."""

    def after_step(self, buckets: Optional[set[int]] = None) -> None:
        """The masters have moved; of `buckets` alone where the engine says which, before working copies are made."""

    def end_step(self, step: int, optimizer) -> bool:
        """A step is done; returns whether masks have changed."""
        return False

    def finish(self) -> None:
        """Training is over, and the model is about to be saved."""


class HardMasks(Regime):
    """Masks on a schedule (one early mask, a ramp, or those that there are), and exact zeros after every step.

    A mask update whose step was passed over, since the run was resumed with another accumulation or length, is made at
    the next step.

    Raises:
        MamaError: `mask_schedule` is hold, and there are no masks, or sparser ones are asked for.
    """

    def __init__(
        self, run: RunState, total_steps: int, calibration: Optional[Sequences] = None,
        schedule: Optional[Schedule] = None,
    ):
        super().__init__(run, total_steps, calibration)
        config = run.config
        self._unchecked = True  # what the optimizer keeps shows after its first step
        self.schedule = schedule or Schedule.resolve(
            config.mask_schedule, config.sparsity, config.start, config.end, config.interval, total_steps
        )
        if self.schedule.last:
            check_redistribution(config, run.targets)
        self._held = run.mask_sparsity
        if config.mask_schedule == "hold" and config.sparsity > 0:
            self._check_held()

    def _check_held(self) -> None:
        run, asked = self.run, self.run.config.sparsity
        if run.masks is None:
            raise MamaError(
                f"`mask_schedule` is 'hold', but no masks lie beside the model {_name(run.model)!r}, and "
                f"{run.sparsity:.2%} of its weights are zero: prune it first, set `mask_schedule` to oneshot or cubic, "
                "or `sparsity` to 0 to train without masks."
            )
        if asked != MamaConfig.sparsity and asked > self._held + max(0.01, run.rounding):
            raise MamaError(
                f"`sparsity` is {asked}, but `mask_schedule` is 'hold' and the masks there are prune {self._held:.4f}: "
                "leave `sparsity` out to hold them, or set `mask_schedule` to oneshot or cubic."
            )

    @property
    def last(self) -> int:
        return self.schedule.last

    def after_step(self, buckets: Optional[set[int]] = None) -> None:
        if self.run.masks is None:
            return
        if buckets is None:  # nobody is about to make working copies of these masters
            self.run.masks.enforce()
        else:
            self.run.masks.apply(buckets=buckets)

    @property
    def target(self) -> float:
        return max(self.schedule.target, self._held) if self.schedule.last else self._held

    def end_step(self, step: int, optimizer) -> bool:
        run = self.run
        if self._unchecked and step <= self.schedule.last:
            self._unchecked = False
            check_moments(Update(run.model, run.targets, run.shards, run.config, run.trajectory, optimizer))
        if not self._missing(self.schedule.last_until(step)):
            return False
        sparsity = self.schedule.sparsity(step)
        if sparsity >= run.mask_sparsity:  # masks inherited from an earlier stage may be sparser than the ramp is now
            update = Update(
                run.model, run.targets, run.shards, run.config, run.trajectory, optimizer, self._own_calibration()
            )
            run.masks = update_masks(update, sparsity)
            if run.trajectory.recorded("reward"):
                run.attribution = histogram(run.trajectory, "reward", run.masks)
        run.mask_step = step
        return True

    def pending(self, step: int) -> bool:
        return self._missing(self.schedule.last)

    def _missing(self, step: int) -> bool:
        """Whether the update that the schedule has at `step` is still to be made; the one mask is made once."""
        done = self.run.mask_step
        return done < step and not (done and self.schedule.kind == "oneshot")

    def finish(self) -> None:
        if self.run.masks is not None:
            self.run.masks.enforce()  # whatever the Trainer has loaded as the best model

    def _own_calibration(self) -> Optional[Sequences]:
        """This rank's calibration sequences; None where some rank has none."""
        device = next(iter(self.run.shards.values())).parameter.device
        return own_share(self.calibration, self.run.inputs.sequences(), device)


def _name(model: nn.Module) -> str:
    return getattr(model, "name_or_path", "")
