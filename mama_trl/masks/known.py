"""Which masks a model object got last, held by weak reference, and saving them wherever the object is saved.

`prune` and training runs tell it: the next run on the same object then goes on with these masks and not with older ones
from a folder, and `model.save_pretrained(folder)`, which `trainer.save_model(folder)` calls too, writes them beside the
weights, after a look whether the weights are numbers at all.
"""

import functools
import logging
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import Any, Collection, Mapping, Optional
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..engines import ranks
from ..engines.counts import some_not_finite
from ..engines.detect import shards_of, unwrap
from ..engines.offload import is_offloaded, readable_parameters
from ..engines.shard import Shard, group_of
from ..errors import MamaError
from .bits import bytes_for, pack_bits, unpack_bits, unpack_flags
from .files import FOLDER, STATE_FILE, STEMS, files_of
from .maskset import STEM, MaskSet

logger = logging.getLogger(__name__)


@dataclass
class Known:
    """What a model object got last.

    Args:
        masks: as this rank holds them; None if the last run on the object had none.
        whole: all of them, on the first rank; the same object where ranks do not share the parameters.
        folder: where the run that left the object as it is wrote its statistics; None if nobody did.
    """

    masks: Optional[MaskSet] = None
    whole: Optional[MaskSet] = None
    folder: Optional[Path] = None


_KNOWN: "WeakKeyDictionary[nn.Module, Known]" = WeakKeyDictionary()


def known(model: nn.Module) -> Optional[Known]:
    """What this very object got last in this process; None if nothing of ours has touched it. Copies are others."""
    return _KNOWN.get(unwrap(model))


def remember(model: nn.Module, masks: Optional[MaskSet], folder: Optional[Path] = None) -> None:
    """Notes the masks (or that there are none) that `model` has from now on. Collective where ranks share them."""
    model = unwrap(model)
    whole = masks if masks is None or not masks.spread else _on_first_rank(masks)
    _KNOWN[model] = Known(masks, whole, folder)
    if isinstance(model, PreTrainedModel) and "save_pretrained" not in vars(model):
        # On this object alone. Copies and pickles get a method of their own, which finds nothing about them here.
        vars(model)["save_pretrained"] = MethodType(_save_pretrained, model)


def taken_over(found: Known, model: nn.Module) -> Optional[MaskSet]:
    """The masks of `found`, bound to the parameters as this run holds them. Collective.

    Raises `MamaError` if the model has other parameters by now.
    """
    if found.masks is None:
        return None
    old = found.masks
    old.check(model, "the memory of this model object")
    parameters = dict(model.named_parameters())
    shards = shards_of((name, parameters[name]) for name in old.names)
    if old.spread or group_of(shards) is not None:
        bits = {shard.name: _owned_of_first(found.whole, shard) for shard in shards}
    else:
        bits = {shard.name: old.bits[shard.name].to(shard.master.device, copy=True) for shard in shards}
    return MaskSet.from_shards(bits, shards, old.pattern, old.zeros)


def elsewhere(model: nn.Module, names: Collection[str]) -> Optional[MaskSet]:
    """The masks that `model` has, in memory or beside it, of other parameters than `names`, bound to it; None where it
    has none, or where the weights under them are not zero any more.

    Raises `MamaError` if a mask file is damaged.
    """
    found, folder = known(model), getattr(model, "name_or_path", None)
    masks = found.whole if found is not None else MaskSet.load(folder) if folder else None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name not in names}
    there = [name for name in masks.names if shapes.get(name) == masks.shapes[name]] if masks is not None else []
    if masks is None or not there:
        return None
    bits = {name: masks.bits[name] for name in there}
    own = MaskSet(bits, {name: shapes[name] for name in there}, masks.pattern)
    parts = ({key: value.data for key, value in part.items()} for part in readable_parameters(model))
    if any(_compared(own, part)[0] for part in parts):
        return None
    if not is_offloaded(model):
        own.bind(shards_of((name, parameter) for name, parameter in model.named_parameters() if name in bits))
    return own


def _owned_of_first(whole: Optional[MaskSet], shard: Shard) -> Tensor:
    """Packed flags of what this rank owns, of masks that the first rank holds."""
    size = bytes_for(shard.numel)
    device = shard.parameter.device
    packed = whole.bits[shard.name].to(device) if whole is not None else torch.empty(
        size, dtype=torch.uint8, device=device
    )
    flags = unpack_flags(ranks.from_rank(packed, 0, ranks.everyone()))
    return pack_bits(flags[shard.start : shard.start + shard.length]).to(shard.master.device)


def _on_first_rank(masks: MaskSet) -> Optional[MaskSet]:
    """All of masks that ranks share, on the CPU of the first rank, which saves models alone; None on the others."""
    first, bits = ranks.rank(ranks.everyone()) == 0, {}
    for name in masks.names:
        packed = pack_bits(masks.whole(name))
        if first:
            bits[name] = packed.cpu()
    return MaskSet(bits, masks.shapes, masks.pattern) if first else None


# ---------------------------------------------------------------------- wherever the model is saved


@functools.wraps(PreTrainedModel.save_pretrained)
def _save_pretrained(self: PreTrainedModel, save_directory: str | PathLike, *args: Any, **kwargs: Any) -> Any:
    main = kwargs.get("is_main_process", args[0] if args else True)
    if main and self in _KNOWN and ranks.rank(ranks.everyone()) == 0:
        state = kwargs.get("state_dict", args[1] if len(args) > 1 else None)
        _save_beside(_KNOWN[self], self, Path(save_directory), _values(self, state))
    return type(self).save_pretrained(self, save_directory, *args, **kwargs)


def _values(model: nn.Module, state: Optional[Mapping[str, Any]]) -> dict[str, Tensor]:
    """The tensors that are about to be saved, by name: of this process alone where the model is spread, and without
    those that are fetched when their module runs."""
    if state is not None:
        return {name: value for name, value in state.items() if isinstance(value, Tensor)}
    values = {shard.name: shard.saved for shard in shards_of(model.named_parameters())}
    return {name: value for name, value in values.items() if value.numel() and not value.is_meta}


@torch.no_grad()
def _save_beside(entry: Known, model: nn.Module, folder: Path, values: dict[str, Tensor]) -> None:
    """Writes the masks into `folder/mama/`, or deletes those of whatever was saved there before.

    Raises `MamaError`, with nothing written, if a weight is NaN or infinite.
    """
    bad = some_not_finite(values)
    if bad is not None:
        raise MamaError(f"{bad} holds NaN or infinity, so nothing is saved in {folder}: lower the learning rate.")
    _forget_earlier(entry, model, folder)
    if is_checkpoint(folder):
        (folder / FOLDER).mkdir(parents=True, exist_ok=True)  # whatever happens from here on, it is one of ours
    if entry.whole is None:
        return
    wrong, zeros = _compared(entry.whole, values)
    if wrong:
        logger.warning(
            "%d connections that the masks of this model prune are not zero in what is saved in %s: training goes on "
            "from there only with inherit_masks false, or enforce_masks true.", wrong, folder,
        )
    entry.whole.save(folder, zeros)


def _compared(masks: MaskSet, values: dict[str, Tensor]) -> tuple[int, Optional[dict[str, int]]]:
    """(pruned connections that are not zero in `values`, all exact zeros by name or None if some are not there)."""
    wrong, zeros = [], {}
    for name in masks.names:
        value = values.get(name)
        if value is not None and value.numel() == torch.Size(masks.shapes[name]).numel():
            value = value.reshape(-1)
            pruned = ~unpack_bits(masks.bits[name].to(value.device), value.shape)
            wrong.append((value[pruned] != 0).sum().cpu())
            zeros[name] = value.numel() - value.count_nonzero().cpu()
    complete = len(zeros) == len(masks.names)
    return int(sum(wrong)), {name: int(number) for name, number in zeros.items()} if complete else None


def _forget_earlier(entry: Known, model: nn.Module, folder: Path) -> None:
    """Deletes what an earlier model left in `folder/mama/`; statistics stay where they are this model's own."""
    own = {Path(place).resolve() for place in (entry.folder, getattr(model, "name_or_path", None)) if place}
    stems = (STEM,) if folder.resolve() in own and not is_checkpoint(folder) else STEMS
    for path in [path for stem in stems for path in files_of(folder / FOLDER, stem)]:
        path.unlink(missing_ok=True)
    if len(stems) > 1:
        (folder / FOLDER / STATE_FILE).unlink(missing_ok=True)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is named as the Trainer names its checkpoints."""
    return folder.name.startswith("checkpoint-") and folder.name.rpartition("-")[2].isdigit()
