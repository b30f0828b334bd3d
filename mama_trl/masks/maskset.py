"""`MaskSet`: which connections are kept, one bit each, in memory and on disk."""

import hashlib
from pathlib import Path
from typing import Iterable, Mapping, Optional

import torch
from torch import Tensor, nn

from ..config import parse_pattern
from ..engines import ranks
from ..engines.detect import shards_of
from ..engines.shard import Shard, full_shape, fused_groups, group_of
from ..errors import MamaError
from .bits import bytes_for, count, keep_only, pack_bits, unpack_bits, unpack_flags
from .files import FOLDER, RangeReader, write_ranges

STEM = "masks"


class MaskSet:
    """Masks by parameter name, of what this rank owns of each parameter, in the parameter's own layout
    (GPT-2's Conv1D is (in, out)).

    Args:
        bits: packed flags of the owned range of each parameter, uint8, 1 = kept.
        shapes: shape of each whole parameter.
        pattern: `unstructured` or N:M.
        ranges: (start, length) of what `bits` cover; default everything.
        kept: kept connections of each whole parameter; counted here if every range is everything.
        zeros: exact zeros of each whole parameter in the weights that these masks were saved with, by which weights are
            known that somebody has pruned further since; None if nobody counted.
    """

    def __init__(
        self,
        bits: dict[str, Tensor],
        shapes: dict[str, tuple],
        pattern: str = "unstructured",
        ranges: Optional[dict[str, tuple[int, int]]] = None,
        kept: Optional[dict[str, int]] = None,
        zeros: Optional[dict[str, int]] = None,
    ):
        self.bits = bits
        self.zeros = zeros
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.pattern = pattern
        everything = {name: (0, torch.Size(shape).numel()) for name, shape in self.shapes.items()}
        self.ranges: dict[str, tuple[int, int]] = dict(ranges) if ranges else everything
        self.kept = kept if kept is not None else {name: int(count(own)) for name, own in bits.items()}
        self._shards: list[Shard] = []
        self._plan: list = []

    @classmethod
    def from_masks(
        cls, masks: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], pattern: str = "unstructured"
    ) -> "MaskSet":
        """From bool tensors of whole parameters, True = kept; of pairs one at a time is held."""
        bits, shapes = {}, {}
        for name, mask in masks.items() if isinstance(masks, Mapping) else masks:
            bits[name], shapes[name] = pack_bits(mask), tuple(mask.shape)
        return cls(bits, shapes, pattern)

    @classmethod
    def from_shards(
        cls, bits: dict[str, Tensor], shards: list[Shard], pattern: str = "unstructured",
        zeros: Optional[dict[str, int]] = None,
    ) -> "MaskSet":
        """From packed bits of what each of `shards` owns. Collective: the kept are counted over ranks."""
        group = group_of(shards)
        counts = ranks.total(torch.stack([count(bits[shard.name]) for shard in shards]), group).tolist()
        result = cls(
            bits,
            {shard.name: shard.shape for shard in shards},
            pattern,
            {shard.name: (shard.start, shard.length) for shard in shards},
            {shard.name: kept for shard, kept in zip(shards, counts)},
            zeros,
        )
        result.bind(shards)
        return result

    def joined(self, earlier: Optional["MaskSet"]) -> "MaskSet":
        """These masks, and of `earlier` those of the matrices that these say nothing of. Collective.

        Both are bound to the parameters of one model, or (where these are elsewhere) to none.
        """
        others = [name for name in earlier.names if name not in self.shapes] if earlier is not None else []
        if earlier is None or not others:
            return self
        shards = [*self._shards, *(shard for shard in earlier._shards if shard.name in others)]
        bits = {**self.bits, **{name: earlier.bits[name] for name in others}}
        pattern = self.pattern if self.pattern == earlier.pattern else "unstructured"
        if not shards:
            return MaskSet(bits, {**self.shapes, **{name: earlier.shapes[name] for name in others}}, pattern)
        return MaskSet.from_shards(bits, shards, pattern)

    # ------------------------------------------------------------------ reading

    @property
    def names(self) -> list[str]:
        return list(self.bits)

    def mask(self, name: str) -> Tensor:
        """Bool, True = kept: of the parameter's shape, or (owned,) where ranks share it."""
        start, length = self.ranges[name]
        whole = length == torch.Size(self.shapes[name]).numel()
        return unpack_bits(self.bits[name], self.shapes[name] if whole else (length,))

    def whole(self, name: str) -> Tensor:
        """Bool mask of the whole parameter. Collective where ranks share it."""
        start, length = self.ranges[name]
        flags = torch.zeros(torch.Size(self.shapes[name]).numel(), dtype=torch.uint8, device=self.bits[name].device)
        flags[start : start + length] = unpack_flags(self.bits[name], torch.uint8)[:length]
        return ranks.total(flags, group_of(self._shards)).bool().view(self.shapes[name])

    def sparsity(self, name: Optional[str] = None) -> float:
        """Pruned share of one parameter, or of all masked parameters together, over all ranks."""
        names = [name] if name else self.names
        return 1.0 - sum(self.kept[n] for n in names) / sum(torch.Size(self.shapes[n]).numel() for n in names)

    @property
    def pruned(self) -> dict[str, int]:
        """How many connections of each whole parameter are pruned."""
        return {name: torch.Size(shape).numel() - self.kept[name] for name, shape in self.shapes.items()}

    def digest(self) -> str:
        """SHA-256 over names and whole masks: equal on ranks and runs that agree. Collective where ranks share them."""
        sha = hashlib.sha256()
        for name in sorted(self.bits):
            sha.update(name.encode())
            packed = self.bits[name] if not self.spread else pack_bits(self.whole(name))
            sha.update(packed.cpu().numpy().tobytes())
        return sha.hexdigest()

    @property
    def spread(self) -> bool:
        """Whether ranks share the masked parameters, so that each holds a part of the masks."""
        return group_of(self._shards) is not None

    # ------------------------------------------------------------------ zeroing

    def bind(self, shards: Iterable[Shard]) -> None:
        """Chooses the parameters that `enforce`, `apply` and `verify` act on when no model is given."""
        by_name = {shard.name: shard for shard in shards}
        self._shards = [by_name[name] for name in self.bits]
        # The bits of a device lie in one tensor, so that one operation unpacks the masks of many parameters.
        for device in {shard.master.device for shard in self._shards}:
            own = [shard for shard in self._shards if shard.master.device == device]
            flat = torch.cat([self.bits[shard.name].to(device) for shard in own])
            for shard, part in zip(own, flat.split([bytes_for(shard.length) for shard in own])):
                self.bits[shard.name] = part
        self._plan = [(group, self._bits_of(group)) for group in fused_groups(self._shards)]

    def _bits_of(self, group: list[tuple[Shard, int, int]]) -> Tensor:
        """The packed flags of neighbouring fused_groups: a view where they lie side by side."""
        parts = [self.bits[s.name][begin // 8 : begin // 8 + bytes_for(end - begin)] for s, begin, end in group]
        first, size = parts[0], sum(part.numel() for part in parts)
        if all(b.data_ptr() == a.data_ptr() + a.numel() for a, b in zip(parts, parts[1:])):
            return first.as_strided((size,), (1,))
        return torch.cat(parts)

    @torch.no_grad()
    def apply(self, model: Optional[nn.Module] = None, buckets: Optional[set[int]] = None) -> None:
        """Sets pruned connections to exactly 0.0 in what the optimizer updates (NaN too), a few fused operations for
        all parameters. `buckets` limits it to those that one optimizer call has updated.

        Under DeepSpeed the working copies follow when the engine writes them; elsewhere there are none.
        """
        if model is not None:
            self._bind_to(model)
        for group, packed in self._plan:
            if buckets is None or group[0][0].bucket in buckets:
                keep_only([shard.master[begin:end] for shard, begin, end in group], packed)

    @torch.no_grad()
    def enforce(self, model: Optional[nn.Module] = None) -> None:
        """`apply`, and the working copies of every engine now rather than after the next step. Collective."""
        self.apply(model)
        for shard in self._shards:
            shard.publish()

    @torch.no_grad()
    def verify(self, model: Optional[nn.Module] = None) -> int:
        """Number of pruned connections that are not exactly 0.0 in any copy, over all ranks. Collective."""
        if model is not None:
            self._bind_to(model)
        wrong = torch.zeros((), dtype=torch.int64, device=self._shards[0].master.device)
        for shard in self._shards:
            pruned = ~unpack_bits(self.bits[shard.name], (shard.length,))
            checked = [(shard.master, pruned)]
            for copy in shard.working_copies:
                # By the engine, not by this rank's share, so that all ranks take the same branch.
                whole = shard.group is not None and copy.numel() == shard.numel
                checked.append((copy, ~self.whole(shard.name).view(-1) if whole else pruned))
            for values, where in checked:
                wrong += (values[where.to(values.device)] != 0).sum().to(wrong.device)
        return int(ranks.total(wrong, group_of(self._shards)))

    def _bind_to(self, model: nn.Module) -> None:
        parameters = dict(model.named_parameters())
        if not self._shards or any(shard.parameter is not parameters.get(shard.name) for shard in self._shards):
            self.bind(shards_of((name, parameters[name]) for name in self.bits))

    # ------------------------------------------------------------------ files

    def check(self, model: nn.Module, where: str) -> None:
        """Raises `MamaError` naming the first parameter that does not fit `model`; `where` names the file."""
        parameters = dict(model.named_parameters())
        for name, shape in self.shapes.items():
            if name not in parameters:
                raise MamaError(
                    f"{where} holds a mask for {name}, which this model lacks: it belongs to another model; "
                    "give its own masks, or set inherit_masks to false."
                )
            if full_shape(parameters[name]) != shape:
                raise MamaError(
                    f"{where} holds a mask of shape {list(shape)} for {name}, whose shape is "
                    f"{list(full_shape(parameters[name]))}: it belongs to another model; give its own masks, or set "
                    "inherit_masks to false."
                )

    def save(self, folder: str | Path, zeros: Optional[dict[str, int]] = None) -> Path:
        """Writes `folder/mama/masks.safetensors`, or this rank's part of it, atomically; returns its path.

        `zeros` are those of the weights beside which the masks are saved, as in the constructor.
        """
        header = {"shapes": self.shapes, "pattern": self.pattern, "kept": self.kept, "format": "mama-masks-3"}
        if zeros is not None:
            header["zeros"] = zeros
        return write_ranges(folder, STEM, self.bits, self.ranges, header, group_of(self._shards))

    @classmethod
    def load(
        cls, folder: str | Path, model: Optional[nn.Module] = None, zeros: bool = True
    ) -> Optional["MaskSet"]:
        """Reads what any number of ranks saved; None if there is no mask file.

        With a `model` whose parameters are spread over ranks, only what this rank owns is read; with `zeros`, what is
        pruned must be zero in it.

        Raises:
            MamaError: a file is damaged or missing, or (with `model`) the masks are another model's.
        """
        reader = RangeReader.find(folder, STEM)
        if reader is None:
            return None
        shapes, pattern, kept = _header(reader)
        result = cls({}, shapes, pattern, kept=kept, zeros=_zeros(reader, shapes))
        shards = []
        if model is not None:
            result.check(model, str(Path(folder) / FOLDER))
            parameters = dict(model.named_parameters())
            shards = shards_of((name, parameters[name]) for name in shapes)
            result.ranges = {shard.name: (shard.start, shard.length) for shard in shards}
        result.bits = {name: reader.read(name, *result.ranges[name], bits=True) for name in shapes}
        result._check_counts(reader, group_of(shards))
        if model is not None:
            result.bind(shards)
            if zeros:
                result.check_zeros(str(Path(folder) / FOLDER))
        return result

    def _check_counts(self, reader: RangeReader, group: ranks.Group) -> None:
        """Raises `MamaError` if the bits are not those that the header counts. Collective where ranks share them."""
        if not self.bits:
            return
        counts = torch.stack([count(own) for own in self.bits.values()])
        for name, found in zip(self.bits, ranks.total(counts, group).tolist()):
            if found != self.kept[name]:
                raise reader.damaged(f"it keeps {found} connections of {name}, not the {self.kept[name]} that it says")

    def check_zeros(self, where: str) -> None:
        """Raises `MamaError` if connections that are pruned here have weights: the masks are another model's.

        `where` names the file. Collective.
        """
        wrong = self.verify() if self._shards else 0
        if wrong:
            raise MamaError(
                f"{where} holds masks that prune {wrong} connections whose weights are not zero: they belong to "
                "another model; give its own masks, or set inherit_masks to false."
            )


def _header(reader: RangeReader) -> tuple[dict[str, tuple], str, dict[str, int]]:
    """Shapes, pattern and kept counts of a mask file. Raises `MamaError` if they make no sense."""
    shapes, pattern, kept = (reader.header.get(name) for name in ("shapes", "pattern", "kept"))
    if not isinstance(shapes, dict) or not isinstance(kept, dict):
        raise reader.damaged("its header says nothing of shapes and counts")
    plain = shapes.keys() == kept.keys() and all(
        isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape) for shape in shapes.values()
    )
    if not plain or not isinstance(pattern, str) or not all(type(number) is int for number in kept.values()):
        raise reader.damaged("its header says nothing of shapes, pattern and counts")
    parse_pattern(pattern)
    return {name: tuple(shape) for name, shape in shapes.items()}, pattern, kept


def _zeros(reader: RangeReader, shapes: dict[str, tuple]) -> Optional[dict[str, int]]:
    """Zeros of the weights beside which a mask file was written; None if it does not say."""
    zeros = reader.header.get("zeros")
    if not isinstance(zeros, dict) or zeros.keys() != shapes.keys():
        return None
    return zeros if all(type(number) is int for number in zeros.values()) else None
