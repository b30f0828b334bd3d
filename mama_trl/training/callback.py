"""`MamaCallback`: the Trainer's events, turned into statistics, mask updates and zeros.

Add it to a plain `transformers.Trainer` or to any TRL trainer; nothing else changes:

    trainer = SFTTrainer(model, args=args, train_dataset=data, callbacks=[MamaCallback(MamaConfig(sparsity=0.9))])
"""

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from ..config import MamaConfig, parse_pattern
from ..engines import ranks
from ..engines.detect import engine_of, shards_of, unwrap
from ..engines.shard import Shard
from ..engines.zero import hook_steps
from ..errors import MamaError
from ..folders import write_atomically
from ..indicators.trajectory import STEM as STATISTICS
from ..indicators.trajectory import Trajectory
from ..masks.files import FOLDER, STATE_FILE, forget_others
from ..masks.maskset import STEM as MASKS
from ..masks.maskset import MaskSet
from ..model.targets import Target, find_targets
from ..pruning.update import Update, check_weights, update_masks
from .card import write_card
from .checkpoints import cut_off, is_whole
from .inputs import InputCapture
from .schedule import Schedule

logger = logging.getLogger(__name__)
HISTORY_POINTS = 40  # how often a stage writes down its sample of connections


class MamaCallback(TrainerCallback):
    """Records trajectories, computes masks on a schedule, and keeps pruned connections at exactly 0.0.

    Masks and statistics are saved in `mama/` within every checkpoint and, at the end, within `output_dir`;
    they are restored on resume, and taken up by the next stage that trains a model saved beside them.

    Args:
        config: what to prune and when.
        calibration: token ids, int64 (n, sequence_length), for input norms and grams. Default: the training
            batches seen just before the mask update.
        stage: name of this stage in the trajectory's history.

    Raises (at the start of training):
        MamaError: nothing to prune, unsupported engine or adapters, masks of another model.
    """

    updates: Optional[tuple[str, ...]] = None  # statistics that this stage records; None = all it keeps

    def __init__(
        self, config: Optional[MamaConfig] = None, calibration: Optional[Tensor] = None, stage: str = "train"
    ):
        self.config = config if config is not None else MamaConfig()
        self.calibration = calibration
        self.stage = stage
        self.masks: Optional[MaskSet] = None
        self.trajectory: Optional[Trajectory] = None
        self.targets: list[Target] = []
        self.schedule: Optional[Schedule] = None
        self.engine = ""  # single, ddp, zero1, zero2, zero3 or fsdp2; known when training begins
        self._model: Optional[nn.Module] = None
        self._shards: dict[str, Shard] = {}
        self._unhook: list = []  # under DeepSpeed, whose steps the Trainer's events do not see
        self._capture: Optional[InputCapture] = None
        self._history_every = 1
        self._numbers: dict = {}
        self._protocol = ""
        self._attribution: Optional[dict] = None  # histogram at the last mask update, for the report

    # ------------------------------------------------------------------ events

    def on_init_end(self, args, state, control, **kwargs):
        sentence = cut_off(args.output_dir)
        if sentence and args.should_save:
            logger.warning(sentence)

    @torch.no_grad()
    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.engine = engine_of(model)
        self._model = unwrap(model)
        self.targets = find_targets(self._model, self.config.target_modules, self.config.exclude_modules)
        self._check_trainable()
        self._check_pattern()
        _check_limit(args)
        self._shards = {shard.name: shard for shard in shards_of(self._followed())}
        check_weights(list(self._shards.values()))
        config = self.config
        self.schedule = Schedule.resolve(
            config.mask_schedule, config.sparsity, config.mask_start, config.mask_end, config.mask_interval,
            state.max_steps,
        )
        self.trajectory = Trajectory(list(self._shards.values()), config.statistics)
        self._history_every = max(1, state.max_steps // HISTORY_POINTS)
        self._capture = InputCapture(self._model, config.calibration_tokens)
        self._restore(args, state)
        self._release_hooks()
        self._unhook = hook_steps(optimizer, self._record, self._apply)
        if state.global_step == 0:
            self._sample(0)
        self._watch_inputs(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self._unhook:
            self._record()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if not self._unhook:
            self._apply()

    @torch.no_grad()
    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        step = state.global_step
        if self.schedule.updates(step):
            self._update(self.schedule.sparsity(step), optimizer)
            self.on_masks_updated(step)
        if step % self._history_every == 0:
            self._sample(step)
        self._watch_inputs(step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._forget_best_below_target(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or self.trajectory is None:
            return
        logs.update(self.metrics())
        # The Trainer copied its logs into the history before this event.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(self.metrics())

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        length = getattr(args, "max_length", None)
        self._protocol = f"evaluated at step {state.global_step}" + (f", sequences of {length}" if length else "")
        self._numbers = {key: value for key, value in (metrics or {}).items() if isinstance(value, (int, float))}

    def on_save(self, args, state, control, **kwargs):
        self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._forget_best_below_target(state)

    def on_train_end(self, args, state, control, **kwargs):
        self._release_hooks()
        if self._capture is not None:
            self._capture.stop()
        self.save(args.output_dir)

    def on_push_begin(self, args, state, control, **kwargs):
        # Only the main process comes here: where ranks share the masks, what the last save wrote is pushed.
        if args.should_save and self.trajectory is not None:
            if ranks.everyone() is None:
                self.save(args.output_dir)
            write_card(args.output_dir, self.card())

    # ------------------------------------------------------------------ what users call

    @property
    def sparsity(self) -> float:
        """Sparsity of the masks now; 0.0 before the first mask update."""
        return self.masks.sparsity() if self.masks is not None else 0.0

    def metrics(self) -> dict[str, float]:
        """`mama/sparsity`, and `mama/skipped_steps` where a gradient held NaN or infinity."""
        numbers = {"mama/sparsity": round(self.sparsity, 6)}
        skipped = int(self.trajectory.skipped)
        if skipped:
            numbers["mama/skipped_steps"] = skipped
        return numbers

    def save(self, folder: str | Path) -> None:
        """Writes masks, statistics and the callback's state into `folder/mama/`. Collective.

        `state.json` comes last, after a barrier: where it is missing, the save was cut off.
        """
        everyone, first = ranks.everyone(), ranks.rank(ranks.everyone()) == 0
        state_file = Path(folder) / FOLDER / STATE_FILE
        group = self.trajectory.group
        if first:
            state_file.unlink(missing_ok=True)
            for stem in (MASKS, STATISTICS):
                forget_others(folder, stem, group)
        ranks.wait(everyone)
        if group is not None or first:
            if self.masks is not None:
                self.masks.save(folder)
            self.trajectory.save(folder)
        self._capture.save(folder)
        ranks.wait(everyone)
        if first:
            state = {
                "stage": self.stage, "sparsity": self.sparsity, "engine": self.engine, "ranks": ranks.size(everyone),
                "config": fields_of(self.config),
            }
            if self._attribution is not None:
                state["attribution"] = self._attribution
            write_atomically(state_file, lambda temporary: temporary.write_text(json.dumps(state, indent=1)))
        ranks.wait(everyone)

    def card(self) -> dict:
        """What the model card tells: sparsity, pattern, how it was pruned, and the last evaluation's numbers."""
        return {
            "sparsity": self.sparsity,
            "pattern": self.config.pattern,
            "indicators": ", ".join(self.config.indicators),
            "budget": self.config.budget,
            "redistribution": self.config.redistribution,
            "stage": self.stage,
            "protocol": self._protocol,
            "numbers": self._numbers,
        }

    def on_masks_updated(self, step: int) -> None:
        """Called after every mask update; a trainer that samples from a copy of the model syncs it here."""

    # ------------------------------------------------------------------ inside

    def _record(self) -> None:
        self.trajectory.record(self.updates)

    def _apply(self, buckets: Optional[set[int]] = None) -> None:
        if self.masks is not None:
            self.masks.apply(buckets=buckets)

    def _release_hooks(self) -> None:
        for undo in self._unhook:
            undo()
        self._unhook = []

    def _followed(self) -> list[tuple[str, nn.Parameter]]:
        """Weights and biases of the targets, by name."""
        found = []
        for target in self.targets:
            found.append((target.name, target.parameter))
            if target.bias is not None:
                found.append((f"{target.module_name}.bias", target.bias))
        return found

    def _check_trainable(self) -> None:
        for target in self.targets if self.engine not in ("single", "ddp") else []:
            if not target.parameter.requires_grad:
                raise MamaError(
                    f"{target.name} is frozen, and {self.engine} keeps no optimizer copy of it that masks could be "
                    "applied to: put it into `exclude_modules`, or let it train."
                )

    def _check_pattern(self) -> None:
        group = parse_pattern(self.config.pattern)
        for target in self.targets if group and self.config.sparsity > 0 else []:
            if target.shape[1] % group[1]:
                raise MamaError(
                    f"`pattern` is {self.config.pattern!r}, but {target.name} has {target.shape[1]} inputs, no "
                    f"multiple of {group[1]}: put it into `exclude_modules`, or use unstructured."
                )

    def _restore(self, args, state) -> None:
        """Takes up masks and statistics: this run's own on resume, else those beside the model."""
        resume = state.global_step > 0
        if resume:
            folder = _resumed_from(args, state)
            if not is_whole(folder):
                raise MamaError(
                    cut_off(args.output_dir)
                    or f"{folder} has no {FOLDER}/{STATE_FILE}, so masks and statistics cannot be resumed: start from "
                    "a checkpoint written with MamaCallback."
                )
            self._capture.load(folder)
            stored = json.loads((folder / FOLDER / STATE_FILE).read_text(encoding="utf-8"))
            self._attribution = stored.get("attribution")
        else:
            folder = _beside(self._model) if self.config.inherit_masks else None
        if folder is not None:
            self.masks = MaskSet.load(folder, self._model)
            if self.masks is not None:
                self.masks.enforce()
            self.trajectory.load(folder, resume)
        if self.masks is None and self.config.mask_schedule == "hold" and self.config.sparsity > 0:
            raise MamaError(
                f"`mask_schedule` is 'hold', but no masks lie beside the model {self._model.name_or_path!r}: prune it "
                "first, set `mask_schedule` to oneshot or cubic, or `sparsity` to 0 to train without masks."
            )

    def _watch_inputs(self, step: int) -> None:
        """Captures inputs only before a mask update that will need them."""
        wanted = step < self.schedule.last and self.calibration is None and self.config.needs_calibration
        self._capture.start() if wanted else self._capture.stop()

    def _update(self, sparsity: float, optimizer) -> None:
        if sparsity < self.sparsity:
            return  # masks inherited from an earlier stage are sparser than the ramp is now
        update = Update(
            self._model, self.targets, self._shards, self.config, self.trajectory, optimizer, self._own_calibration()
        )
        self.masks = update_masks(update, sparsity)
        if self.trajectory.recorded("reward"):
            self._attribution = self.trajectory.histogram("reward", self.masks)

    def _own_calibration(self) -> Optional[Tensor]:
        """This rank's share of the calibration tokens, as many rows as every other rank has."""
        everyone = ranks.everyone()
        device = next(iter(self._shards.values())).parameter.device
        rows = self._capture.rows()
        if self.calibration is not None:
            enough = len(self.calibration) >= ranks.size(everyone)
            rows = self.calibration[ranks.rank(everyone) :: ranks.size(everyone)] if enough else self.calibration
        count = ranks.smallest(0 if rows is None else len(rows), everyone, device)
        return rows[:count].to(device) if count else None

    def _sample(self, step: int) -> None:
        self.trajectory.sample(step, self.stage, [target.name for target in self.targets])

    def _forget_best_below_target(self, state) -> None:
        """`load_best_model_at_end` and early stopping must never prefer a checkpoint that is not sparse yet."""
        if self.schedule is not None and state.global_step < self.schedule.last:
            state.best_metric = None
            state.best_model_checkpoint = None
            state.best_global_step = None


def _check_limit(args) -> None:
    """The Trainer deletes the old checkpoint before ours is written: with a limit of 1 a kill in between loses both."""
    if args.save_total_limit == 1 and args.save_strategy != "no":
        raise MamaError(
            "`save_total_limit` is 1, so that a run killed while it saves would be left without a whole checkpoint: "
            "set it to 2."
        )


def fields_of(config: MamaConfig) -> dict:
    """The fields of `MamaConfig` alone, also of a training config that inherits them."""
    return {f.name: getattr(config, f.name) for f in fields(MamaConfig)}


def _resumed_from(args, state) -> Path:
    """The checkpoint that the Trainer resumed, which it tells nobody: the one that the arguments name, or the one in
    the output folder, if its Trainer state is the one that was loaded. Raises `MamaError` if it is another run's."""
    given = args.resume_from_checkpoint
    if isinstance(given, str) and Path(given).is_dir():
        return Path(given)
    folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    try:
        history = json.loads((folder / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["log_history"]
    except (OSError, ValueError, KeyError):
        history = None
    if json.dumps(history) != json.dumps(state.log_history):
        raise MamaError(
            f"the checkpoint that is resumed at step {state.global_step} is not {folder}, so its masks and statistics "
            "cannot be found: set `resume_from_checkpoint` in the training arguments to its folder too."
        )
    return folder


def _beside(model: nn.Module) -> Optional[Path]:
    """The folder that the model was loaded from, if masks or statistics lie in it; hub models are looked up."""
    name = getattr(model, "name_or_path", "") or ""
    if not name:
        return None
    if (Path(name) / FOLDER).is_dir():
        return Path(name)
    if Path(name).exists():
        return None
    return _from_hub(name)


def _from_hub(name: str) -> Optional[Path]:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[f"{FOLDER}/*"]))
    except Exception as error:  # offline, private, or not a hub name: training goes on, said in the log
        logger.info("no masks looked up on the hub for %s: %s", name, error)
        return None
    return folder if (folder / FOLDER).is_dir() else None
