"""How a run becomes sparse: what is done around each optimizer step, and when masks change.

`HardMasks` computes masks on a schedule and keeps pruned connections at exactly zero. Another regime is a class with
the same five methods, given to `MamaCallback(config, regime=...)`: see docs/extend.md.
"""

from typing import Optional

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

    Raises:
        MamaError: `mask_schedule` is hold and there are no masks.
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
        if run.masks is None and config.mask_schedule == "hold" and config.sparsity > 0:
            raise MamaError(
                f"`mask_schedule` is 'hold', but no masks lie beside the model {run.model.name_or_path!r}: prune it "
                "first, set `mask_schedule` to oneshot or cubic, or `sparsity` to 0 to train without masks."
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

    def end_step(self, step: int, optimizer) -> bool:
        run = self.run
        if self._unchecked and step <= self.schedule.last:
            self._unchecked = False
            check_moments(Update(run.model, run.targets, run.shards, run.config, run.trajectory, optimizer))
        if not self.schedule.updates(step):
            return False
        sparsity = self.schedule.sparsity(step)
        if sparsity >= run.sparsity:  # masks inherited from an earlier stage may be sparser than the ramp is now
            update = Update(
                run.model, run.targets, run.shards, run.config, run.trajectory, optimizer, self._own_calibration()
            )
            run.masks = update_masks(update, sparsity)
            if run.trajectory.recorded("reward"):
                run.attribution = histogram(run.trajectory, "reward", run.masks)
        return True

    def _own_calibration(self) -> Optional[Sequences]:
        """This rank's calibration sequences; None where some rank has none."""
        device = next(iter(self.run.shards.values())).parameter.device
        return own_share(self.calibration, self.run.inputs.sequences(), device)
