"""Grams of layers' inputs, by hooks while a module runs."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import MamaError
from ..model.targets import Target
from ..solvers.problem import Goal, Gram


@dataclass
class Measured:
    """What was measured of layers that are pruned together.

    Whoever takes it may empty `grams` and `goals`, so that no gram is held longer than needed.

    Args:
        targets: the layers.
        grams: of their inputs, by target name; layers that read one tensor share one.
        goals: what they should put out, by target name, for those that have one.
    """

    targets: list[Target]
    grams: dict[str, Gram]
    goals: dict[str, Goal] = field(default_factory=dict)


class _ExpertInputs(TorchFunctionMode):
    """Adds to an expert's gram whatever is multiplied with its slice of the fused weights, while it is active.

    It watches every matrix product, so that neither the module's name nor its way of routing matters: a product with
    `parameter[expert]` (any of `linear`, `matmul`, `@`, `mm`) or a batched product with the whole 3-D parameter.
    """

    _PRODUCTS = {F.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
    _BATCHED = {torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}

    def __init__(self, targets: list[Target], grams: dict[str, Gram]):
        super().__init__()
        self._grams = grams
        # Where each expert's matrix starts in memory: a view of it starts there too.
        self._single = {t.parameter.data[t.expert].data_ptr(): t for t in targets}
        self._whole: dict[int, dict[int, Target]] = {}
        for t in targets:
            self._whole.setdefault(t.parameter.data.data_ptr(), {})[t.expert] = t

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in self._PRODUCTS or function in self._BATCHED:
            inputs, weight = [*args, *(kwargs or {}).values()][:2]
            self._note(function, inputs, weight)
        return function(*args, **(kwargs or {}))

    def _note(self, function, inputs: Tensor, weight: Tensor) -> None:
        address = weight.data_ptr()
        if weight.dim() == 2 and address in self._single:
            target = self._single[address]
            if inputs.shape[-1] == target.shape[1]:
                self._grams[target.name].add(inputs)
        elif weight.dim() == 3 and inputs.dim() == 3 and address in self._whole and function in self._BATCHED:
            for expert, target in self._whole[address].items():
                rows = inputs[expert]
                if rows.shape[-1] == target.shape[1]:
                    self._grams[target.name].add(rows[(rows != 0).any(-1)])  # tokens of other experts are zeroed


def first_of(args: tuple, kwargs: dict) -> Tensor:
    """What a layer reads, whether it is called by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def collect(
    module: nn.Module, targets: list[Target], forward: Callable[[], None], share: bool = True
) -> dict[str, Gram]:
    """Grams by target name while `forward` runs `module`; layers that read the very same tensor share one `Gram`.

    A fused expert's gram is over the tokens that were routed to it.

    Args:
        share: False where ranks add their grams up and one may call layers that another does not.
    """
    linear = [t for t in targets if t.expert is None]
    fused = [t for t in targets if t.expert is not None]
    grams = {t.name: Gram.zeros(t.shape[1], t.parameter.device) for t in fused}
    leader: dict[str, str] = {}  # by target name: whose gram it shares
    last: list = [None, None]  # the newest input and who took it

    def note(target: Target, inputs: Tensor) -> None:
        if target.name not in leader:
            # Query, key and value (gate and up) are called one after the other on one and the same tensor.
            leader[target.name] = last[1] if share and last[0] is inputs else target.name
            if leader[target.name] == target.name:
                grams[target.name] = Gram.zeros(target.shape[1], target.parameter.device)
            else:
                grams[target.name] = grams[leader[target.name]]
        first = leader[target.name]
        if first == target.name:
            grams[first].add(inputs)
        elif share and last[0] is not inputs:
            raise MamaError(
                f"{target.name} does not read the tensor that {first} reads in every batch: this model's layers "
                "cannot be calibrated."
            )
        last[:] = inputs, first

    def hook_of(target: Target) -> Callable:
        return lambda _, args, kwargs: note(target, first_of(args, kwargs))

    handles = [t.module.register_forward_pre_hook(hook_of(t), with_kwargs=True) for t in linear]
    try:
        with _ExpertInputs(fused, grams) if fused else nullcontext():
            forward()
    finally:
        last.clear()
        for handle in handles:
            handle.remove()
    for name, gram in grams.items():
        if not torch.isfinite(gram.total).all():
            raise MamaError(
                f"the inputs of {name} hold NaN or infinity during calibration: load the model in another dtype "
                "(`dtype` float32 or bfloat16), or check its weights."
            )
    for target in linear:  # an expert in a list of modules to which no token came
        if target.name not in grams:
            grams[target.name] = Gram.zeros(target.shape[1], target.parameter.device)
    return {target.name: grams[target.name] for target in targets}  # in the same order on every rank
