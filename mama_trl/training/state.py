"""`RunState`: what a run remembers, and how that is saved, restored and inherited."""

import json
from pathlib import Path
from typing import Optional

from torch import Tensor, nn

from ..config import MamaConfig
from ..engines import ranks
from ..engines.detect import engine_of, shard_of, shards_of, unwrap
from ..engines.shard import Shard
from ..errors import MamaError
from ..indicators.history import sample
from ..indicators.trajectory import STEM as STATISTICS
from ..indicators.trajectory import Trajectory
from ..masks.files import FOLDER, STATE_FILE, RangeReader, forget_others, write_ranges
from ..masks.maskset import STEM as MASKS
from ..masks.maskset import MaskSet
from ..model.fits import check_fits
from ..model.targets import Target, find_targets
from ..pruning.update import check_weights
from ..writing import write_json
from .inputs import InputCapture
from .persistence import require_whole

REGIME = "regime"  # stem of the files that hold a regime's own tensors


class RunState:
    """Masks, statistics, the tokens last seen, and whatever tensors the regime keeps, of one run on one model.

    Made anew when a training begins, so that nothing of an earlier run or model is left.

    Args:
        model: as the Trainer's events hand it over, under any engine.
        stage: name of this stage in the trajectory's history.

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
        check_weights(list(self.shards.values()))
        self.trajectory = Trajectory(list(self.shards.values()), config.recorded)
        self.inputs = InputCapture(self.model, config.tokens)
        self.masks: Optional[MaskSet] = None
        self.attribution: Optional[dict] = None  # histogram at the last mask update, for the report
        self.regime_tensors: dict[str, Tensor] = {}  # by any name that ends in "/" and a parameter's; owned ranges

    @property
    def sparsity(self) -> float:
        """Sparsity of the masks now; 0.0 before the first mask update."""
        return self.masks.sparsity() if self.masks is not None else 0.0

    def sample(self, step: int) -> None:
        """Writes down the sampled connections of the trajectory's history."""
        sample(self.trajectory, step, self.stage, [target.name for target in self.targets])

    # ------------------------------------------------------------------ files

    def save(self, folder: str | Path) -> None:
        """Writes everything into `folder/mama/`. Collective.

        `state.json` comes last, after a barrier: where it is missing, the save was cut off.
        """
        everyone, first = ranks.everyone(), ranks.rank(ranks.everyone()) == 0
        state_file = Path(folder) / FOLDER / STATE_FILE
        group = self.trajectory.group
        if first:
            state_file.unlink(missing_ok=True)
            for stem in (MASKS, STATISTICS, REGIME):
                forget_others(folder, stem, group)
        ranks.wait(everyone)
        if group is not None or first:
            if self.masks is not None:
                self.masks.save(folder)
            self.trajectory.save(folder)
            if self.regime_tensors:
                ranges = {key: self._range(key) for key in self.regime_tensors}
                write_ranges(folder, REGIME, self.regime_tensors, ranges, {"format": "mama-regime-1"}, group)
        self.inputs.save(folder)
        ranks.wait(everyone)
        if first:
            state = {
                "stage": self.stage, "sparsity": self.sparsity, "engine": self.engine, "ranks": ranks.size(everyone),
                "config": fields_of(self.config),
            }
            if self.attribution is not None:
                state["attribution"] = self.attribution
            write_json(state_file, state)
        ranks.wait(everyone)

    def restore(self, folder: Path, output_dir: str | Path) -> None:
        """Takes up what this run itself saved in the checkpoint `folder`. Raises `MamaError` if that is not whole."""
        require_whole(folder, output_dir)
        self.inputs.load(folder)
        stored = json.loads((folder / FOLDER / STATE_FILE).read_text(encoding="utf-8"))
        self.attribution = stored.get("attribution")
        self._take_up(folder, resume=True)
        reader = RangeReader.find(folder, REGIME)
        for key in reader.names if reader is not None else []:
            self.regime_tensors[key] = reader.read(key, *self._range(key)).to(self._shard(key).master.device)

    def inherit(self, folder: Optional[Path]) -> None:
        """Takes up masks and statistics that an earlier stage left beside the model; None = there is no such place."""
        if folder is not None:
            self._take_up(folder, resume=False)

    def _take_up(self, folder: Path, resume: bool) -> None:
        self.masks = MaskSet.load(folder, self.model)
        if self.masks is not None:
            self.masks.enforce()
        self.trajectory.load(folder, resume)

    def _range(self, key: str) -> tuple[int, int]:
        """What this rank owns of the parameter that a regime's tensor belongs to."""
        shard = self._shard(key)
        return shard.start, shard.length

    def _shard(self, key: str) -> Shard:
        """The parameter that a regime's tensor belongs to."""
        return self.shards[key.rpartition("/")[2]]


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
