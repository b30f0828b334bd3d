"""`RunState`: what a run remembers, and how that is saved, restored and inherited."""

from pathlib import Path
from typing import Any, Optional

from torch import Tensor, nn

from ..config import MamaConfig
from ..disk.writing import write_text
from ..engines import ranks
from ..engines.counts import first_not_finite, zeros_of
from ..engines.detect import engine_of, shard_of, shards_of, unwrap
from ..engines.shard import Shard
from ..errors import MamaError
from ..indicators.history import sample
from ..indicators.trajectory import STEM as STATISTICS
from ..indicators.trajectory import Trajectory
from ..masks.files import FOLDER, STATE_FILE, STEMS, RangeReader, files_of, write_ranges
from ..masks.known import known, remember
from ..masks.maskset import STEM as MASKS
from ..masks.maskset import MaskSet
from ..model.blocks import find_blocks
from ..model.fits import check_fits
from ..model.targets import Target, find_targets
from .checkpoints import require_whole
from .identity import difference
from .inheritance import held, inherited, warn_of_free_zeros
from .inputs import STEM as INPUTS
from .inputs import InputCapture
from .manifest import listing, read_state, sealed

REGIME = "regime"  # stem of the files that hold a regime's own tensors


class RunState:
    """Masks, statistics, the tokens last seen, and whatever tensors the regime keeps, of one run on one model.

    Made anew when a training begins, so that nothing of an earlier run or model is left.

    Args:
        model: as the Trainer's events hand it over, under any engine.
        stage: name of this stage in the trajectory's history.

    `mask_step` is the step of the last mask update that the schedule asked for (0 before the first), `identity` says
    which run this is (see identity.py), `attribution` is a histogram at the last mask update, for the report, and
    `regime_tensors` are by any name that ends in "/" and a parameter's: of the ranges that this rank owns.

    Raises:
        MamaError: nothing to prune, an unsupported engine or adapters, frozen targets where the engine keeps no
            master of them, a pattern or sparsity that the matrices cannot have, or a weight that is NaN.
    """

    def __init__(self, model: nn.Module, config: MamaConfig, stage: str):
        MamaConfig.__post_init__(config)  # what has been set since it was made is checked like what it was made with
        self.config, self.stage = config, stage
        self.engine = engine_of(model)  # single, ddp, zero1, zero2, zero3 or fsdp2
        self.model = unwrap(model)
        self.targets: list[Target] = find_targets(self.model, config.target_modules, config.exclude_modules)
        _check_trainable(self.targets, self.engine)
        check_fits(self.targets, config)
        self.shards: dict[str, Shard] = {shard.name: shard for shard in shards_of(_followed(self.targets))}
        self.parameters = shards_of(self.model.named_parameters())
        bad = first_not_finite(self.parameters)
        if bad is not None:
            raise MamaError(
                f"{bad} holds NaN or infinity before the first step: give a model, or a checkpoint, of finite weights."
            )
        self.trajectory = Trajectory(list(self.shards.values()), config.recorded)
        self.inputs = InputCapture(self.model, config.tokens)
        self.mask_step = 0
        self.ended = False  # whether the last step is done
        self.identity: dict[str, Any] = {}
        self.attribution: Optional[dict] = None
        self.regime_tensors: dict[str, Tensor] = {}
        self.zeros: dict[str, int] = {}
        self._masks: Optional[MaskSet] = None

    @property
    def masks(self) -> Optional[MaskSet]:
        """The masks now; None before the first. Setting them is collective.

        Masks of a choice of matrices leave those of all others as they are: what is pruned there stays zero.
        """
        return self._masks

    @masks.setter
    def masks(self, masks: Optional[MaskSet]) -> None:
        self._masks = masks.joined(self._masks) if masks is not None else None
        remember(self.model, self._masks)

    @property
    def prunable(self) -> list[Shard]:
        """The weights of the targets."""
        return [self.shards[target.name] for target in self.targets]

    @property
    def size(self) -> int:
        """How many connections can be pruned."""
        return sum(shard.numel for shard in self.prunable)

    @property
    def rounding(self) -> float:
        """What one connection a row is of a sparsity: masks of rows keep whole connections."""
        return sum(target.shape[0] for target in self.targets) / self.size

    @property
    def sparsity(self) -> float:
        """Share of the prunable weights that are exactly zero, as `count` found it last."""
        return sum(self.zeros.values()) / self.size if self.zeros else 0.0

    @property
    def mask_sparsity(self) -> float:
        """Share of the prunable weights that the masks prune; 0.0 before the first."""
        if self.masks is None:
            return 0.0
        pruned = self.masks.pruned
        return sum(pruned.get(target.name, 0) for target in self.targets) / self.size

    def count(self) -> None:
        """Counts the zeros in the weights. Collective."""
        self.zeros = zeros_of(self.prunable)

    def sample(self, step: int) -> None:
        """Writes down the sampled connections of the trajectory's history."""
        sample(self.trajectory, step, self.stage, [target.name for target in self.targets])

    # ------------------------------------------------------------------ files

    def save(self, folder: str | Path, checkpoint: bool = False, **facts: Any) -> None:
        """Writes everything into `folder/mama/`, and `facts` into its `state.json`. Collective.

        `state.json` comes last, after a barrier: where it is missing, the save was cut off.

        Args:
            checkpoint: whether `folder` is the Trainer's checkpoint, all of whose files are listed then.
        """
        folder, everyone = Path(folder), ranks.everyone()
        self.count()
        if ranks.rank(everyone) == 0:
            (folder / FOLDER / STATE_FILE).unlink(missing_ok=True)
            self._forget_earlier(folder)
        ranks.wait(everyone)
        group = self.trajectory.group
        if group is not None or ranks.rank(everyone) == 0:
            if self.masks is not None:
                self.masks.save(folder, self.zeros if self.zeros.keys() == set(self.masks.names) else None)
            self.trajectory.save(folder)
            if self.regime_tensors:
                ranges = {key: self._range(key) for key in self.regime_tensors}
                write_ranges(folder, REGIME, self.regime_tensors, ranges, {"format": "mama-regime-1"}, group)
        self.inputs.save(folder)
        ranks.wait(everyone)
        if ranks.rank(everyone) == 0:
            state = {
                "stage": self.stage, **facts, "sparsity": self.sparsity, "mask_sparsity": self.mask_sparsity,
                "mask_step": self.mask_step, "engine": self.engine, "ranks": ranks.size(everyone),
                "config": fields_of(self.config), "identity": self.identity,
            }
            if self.attribution is not None:
                state["attribution"] = self.attribution
            if checkpoint:
                state["files"] = listing(folder)
            write_text(folder / FOLDER / STATE_FILE, sealed(state))
        ranks.wait(everyone)

    def leave(self, folder: str | Path) -> None:
        """Notes with the model object, for the next run on it, that its statistics lie in `folder`. Collective."""
        if self.masks is not None and self.zeros.keys() == set(self.masks.names):
            self.masks.zeros = dict(self.zeros)
        remember(self.model, self.masks, Path(folder))

    def _forget_earlier(self, folder: Path) -> None:
        """Deletes files that this save will not write anew, of another number of ranks, another run or model."""
        shared, everyone = self.trajectory.group, ranks.everyone()
        groups = {MASKS: shared, STATISTICS: shared, REGIME: shared, INPUTS: everyone}
        written = {MASKS: self.masks is not None, STATISTICS: True, REGIME: bool(self.regime_tensors), INPUTS: False}
        for stem in STEMS:
            keep = f"-of-{ranks.size(groups[stem]):05d}" if groups[stem] is not None else stem
            for path in files_of(folder / FOLDER, stem):
                if not (written[stem] and path.stem.endswith(keep)):
                    path.unlink(missing_ok=True)

    def restore(self, folder: Path, output_dir: str | Path) -> None:
        """Takes up what this run itself saved in the checkpoint `folder`. Collective.

        Raises `MamaError` if the checkpoint is not whole, or another run's.
        """
        stored = ranks.decided(lambda: _checked(folder, output_dir, self.identity))
        self.inputs.load(folder)
        self.attribution, self.mask_step = stored.get("attribution"), stored["mask_step"]
        self.masks = MaskSet.load(folder, self.model)
        if self.masks is not None:
            self.masks.enforce()
        self.trajectory.load(folder, resume=True)
        reader = RangeReader.find(folder, REGIME)
        for key in reader.names if reader is not None else []:
            self.regime_tensors[key] = reader.read(key, *self._range(key)).to(self._shard(key).master.device)
        self.count()

    def inherit(self, folder: Optional[Path]) -> None:
        """Takes up masks and statistics of earlier stages; those beside the model lie in `folder`. Collective.

        Raises `MamaError` if the masks are another model's.
        """
        config, last = self.config, known(self.model)
        masks = inherited(self.model, folder, config.enforce_masks) if config.inherit_masks else None
        if config.inherit_masks:
            folder = last.folder if last is not None and last.folder is not None else folder
            if folder is not None and (folder / FOLDER).is_dir():
                self.trajectory.load(folder, resume=False)
        self.masks = held(masks, self.prunable, config)
        self.count()
        warn_of_free_zeros(self.masks, self._matrices(), config.mask_schedule)

    def _matrices(self) -> list[Shard]:
        """The targets, and all other matrices within the blocks that train."""
        blocks = tuple(f"{name}." for name, _ in find_blocks(self.model))
        others = [s for s in self.parameters if s.name.startswith(blocks) and len(s.shape) > 1]
        targets = {target.name for target in self.targets}
        return self.prunable + [s for s in others if s.parameter.requires_grad and s.name not in targets]

    def _range(self, key: str) -> tuple[int, int]:
        """What this rank owns of the parameter that a regime's tensor belongs to."""
        shard = self._shard(key)
        return shard.start, shard.length

    def _shard(self, key: str) -> Shard:
        """The parameter that a regime's tensor belongs to."""
        return self.shards[key.rpartition("/")[2]]


def _checked(folder: Path, output_dir: str | Path, here: dict[str, Any]) -> dict[str, Any]:
    """What `state.json` of a checkpoint says. Raises `MamaError` if it is not whole, or another run's."""
    require_whole(folder, output_dir)
    stored = read_state(folder)
    stored.pop("files")
    other = difference(stored["identity"], here)
    if other is not None:
        raise MamaError(
            f"{folder} belongs to another run ({other}): give its settings, or start a new run, with this checkpoint "
            "as its model or in another output folder."
        )
    return stored


def fields_of(config: MamaConfig) -> dict:
    """The fields of `MamaConfig` alone, also of a training config that inherits them."""
    return {name: getattr(config, name) for name in MamaConfig.__dataclass_fields__}


def _followed(targets: list[Target]) -> list[tuple[str, nn.Parameter]]:
    """Weights and biases of the targets, by name."""
    found = []
    for target in targets:
        found.append((target.name, target.parameter))
        if target.bias is not None:
            found.append((f"{target.module_name}.bias", target.bias))
    return found


def _check_trainable(targets: list[Target], engine: str) -> None:
    for target in targets:
        if not target.parameter.requires_grad and not shard_of(target.name, target.parameter).reaches_frozen:
            raise MamaError(
                f"{target.name} is frozen, and {engine} keeps no optimizer copy of it that masks could be applied to: "
                "put it into `exclude_modules`, or let it train."
            )
