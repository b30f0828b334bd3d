"""What a training run left beside a model, as indicators and allocations for one-shot pruning.

MamaCallback leaves running statistics in `mama/`; the Trainer leaves Adam's second moments in a checkpoint's
optimizer.pt.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import MamaError
from ..masks.files import RangeReader
from ..model.targets import Target
from .formulas import curvature
from .trajectory import RULES, STEM

OPTIMIZER = "optimizer.pt"


def recorded(folder: str, model: nn.Module, targets: list[Target]) -> dict[str, dict[str, Tensor]]:
    """Indicators by name, then fp32 (out, in) by target name: what `folder`/mama has of the trajectory's statistics,
    and `curvature` from a checkpoint's optimizer.pt.

    A statistic that is zero everywhere was never recorded and is left out.

    Raises:
        MamaError: a file is damaged or belongs to another model.
    """
    found = {**_statistics(folder, targets), **_curvature(folder, model, targets)}
    return {
        name: values for name, values in found.items()
        if len(values) == len(targets) and any(bool((value != 0).any()) for value in values.values())
    }


def _statistics(folder: str, targets: list[Target]) -> dict[str, dict[str, Tensor]]:
    reader = RangeReader.find(folder, STEM)
    found: dict[str, dict[str, Tensor]] = {}
    if reader is None:
        return found
    shapes = {name: tuple(shape) for name, shape in reader.header["shapes"].items()}
    for indicator in [name for name in reader.header["counts"] if name in RULES]:
        for target in targets:
            # By parameter name, so that only what belongs to a target of this model is read.
            stored, whole = shapes.get(target.parameter_name), tuple(target.parameter.shape)
            if stored is None:
                continue
            if stored != whole:
                raise MamaError(
                    f"{reader.where} holds shape {list(stored)} for {target.parameter_name}, whose shape is "
                    f"{list(whole)}: it belongs to another model; delete it."
                )
            values = reader.read(f"{indicator}/{target.parameter_name}", 0, target.parameter.numel()).view(whole)
            values = target.own(values).float().to(target.parameter.device)
            found.setdefault(indicator, {})[target.name] = RULES[indicator].of_mean(values)
    return found


def _curvature(folder: str, model: nn.Module, targets: list[Target]) -> dict[str, dict[str, Tensor]]:
    path = Path(folder) / OPTIMIZER
    if not path.is_file():
        return {}
    from transformers import Trainer  # which loads DeepSpeed, and a second goes by

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state, order = saved["state"], [i for group in saved["param_groups"] for i in group["params"]]
    except Exception as error:
        raise MamaError(f"{path} cannot be read ({type(error).__name__}): delete it to prune without it.") from None
    # The order in which the Trainer hands parameters to its optimizer: with weight decay first, then the others.
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # it looks at no trainer
    parameters = dict(model.named_parameters())
    names = sorted(parameters, key=lambda name: name not in decayed)
    moments = {name: state.get(i, {}).get("exp_avg_sq") for name, i in zip(names, order)}
    if len(order) != len(names) or any(
        moment is not None and moment.shape != parameters[name].shape for name, moment in moments.items()
    ):
        raise MamaError(f"{path} holds another model's or another trainer's optimizer: delete it to prune without it.")
    found = {
        t.name: curvature(t.matrix.detach(), t.own(moments[t.parameter_name]).to(t.parameter.device))
        for t in targets if moments.get(t.parameter_name) is not None
    }
    return {"curvature": found}
