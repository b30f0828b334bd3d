"""Files of tensors that are spread over ranks: one safetensors file per rank, by name and global range.

A rank on its own writes `STEM.safetensors`, rank r of n `STEM-r-of-n.safetensors`. Any number of ranks can read
what any other number wrote: a reader asks for a flat range of a name and gets it from whichever files hold it.
"""

import re
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from ..engines import ranks
from ..errors import MamaError
from .bits import bytes_for, pack_bits, unpack_flags
from .tensors import TensorFile, write_tensors

FOLDER = "mama"  # beside the model's own files
STATE_FILE = "state.json"  # in FOLDER, written last: where it is missing, the save was cut off
STEMS = ("masks", "statistics", "inputs", "regime")  # of all files of tensors in FOLDER
_KINDS = {"masks": "mask"}
_HEADERS: dict[str, dict[str, type]] = {  # what a header must hold, by stem
    "masks": {"shapes": dict, "pattern": str, "kept": dict},
    "statistics": {"shapes": dict, "counts": dict, "skipped": int, "history": list},
}
_BITS = torch.uint8


def file_name(stem: str, group: ranks.Group) -> str:
    if group is None:
        return f"{stem}.safetensors"
    return f"{stem}-{ranks.rank(group):05d}-of-{ranks.size(group):05d}.safetensors"


def files_of(folder: Path, stem: str) -> list[Path]:
    """All files of `stem`, whoever wrote them."""
    pattern = re.compile(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors")
    return sorted(path for path in folder.glob(f"{stem}*.safetensors") if pattern.fullmatch(path.name))


def write_ranges(
    folder: str | Path, stem: str, tensors: dict[str, Tensor], ranges: dict[str, tuple[int, int]],
    header: dict, group: ranks.Group,
) -> Path:
    """Writes this rank's 1-D `tensors`, whose (start, length) in the whole are `ranges`, into `folder/mama/`.

    Files of the same stem that another number of ranks wrote are stale afterwards: whoever saves removes them first.
    """
    path = Path(folder) / FOLDER / file_name(stem, group)
    # Empty tensors carry nothing but a name, which `ranges` has too.
    full = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    return write_tensors(path, full, {**header, "ranges": ranges})


def _ranges(file: TensorFile) -> dict[str, tuple[int, int]]:
    """(start, length) of each tensor of a file. Raises `MamaError` if its header has none that make sense."""
    ranges = file.header.get("ranges")
    ranges = ranges if isinstance(ranges, dict) else {"": None}
    plain = all(
        isinstance(pair, list) and len(pair) == 2 and all(type(n) is int and n >= 0 for n in pair)
        for pair in ranges.values()
    )
    if not plain or any(name not in file.names for name, (_, length) in ranges.items() if length):
        raise file.damaged("its header does not say which part of what it holds")
    return {name: (start, length) for name, (start, length) in ranges.items()}


class RangeReader:
    """Reads ranges out of what `write_ranges` left in `folder/mama/`.

    Raises:
        MamaError: a file is damaged, or one rank's file is missing.
    """

    def __init__(self, folder: str | Path, stem: str):
        self.where = Path(folder) / FOLDER
        paths = files_of(self.where, stem)
        self._check_complete(paths, stem)
        self._files: list[tuple[TensorFile, dict[str, tuple[int, int]]]] = []
        self.header: dict = {}
        for path in paths:
            file = TensorFile(path, f"{_KINDS.get(stem, stem)} file", "delete it or restore it")
            for entry, kind in _HEADERS.get(stem, {}).items():
                if not isinstance(file.header.get(entry), kind):
                    raise file.damaged(f"its header has no `{entry}`")
            self._files.append((file, _ranges(file)))
            self.header = self.header or {key: value for key, value in file.header.items() if key != "ranges"}
        if not self._files[0][0].names and not self._files[0][1]:
            raise self._files[0][0].damaged("it holds nothing")

    def damaged(self, reason: str) -> MamaError:
        """The error that names the first file."""
        return self._files[0][0].damaged(reason)

    @classmethod
    def find(cls, folder: str | Path, stem: str) -> Optional["RangeReader"]:
        """None if there is no such file."""
        return cls(folder, stem) if files_of(Path(folder) / FOLDER, stem) else None

    def _check_complete(self, paths: list[Path], stem: str) -> None:
        counts = {path.stem.rpartition("-of-")[2] if "-of-" in path.stem else "one" for path in paths}
        if len(counts) != 1:
            raise MamaError(
                f"{self.where} holds {stem} files of runs with different numbers of ranks: a save was cut off there; "
                "use an earlier checkpoint."
            )
        (count,) = counts
        if count != "one" and len(paths) != int(count):
            raise MamaError(
                f"{self.where} holds {len(paths)} of {int(count)} {stem} files: restore the missing ones, or use an "
                "earlier checkpoint."
            )

    @property
    def names(self) -> list[str]:
        """All that can be read."""
        return list(dict.fromkeys(name for _, ranges in self._files for name in ranges))

    def read(self, name: str, start: int, length: int, bits: bool = False) -> Tensor:
        """The flat range [start, start + length) of `name`; with `bits` of flags, packed anew from `start` on.

        Raises `MamaError` if no file holds some part of it.
        """
        parts = []
        position, end = start, start + length
        for file, ranges in sorted(self._files, key=lambda pair: pair[1].get(name, (0, 0))[0]):
            own, size = ranges.get(name, (0, 0))
            low, high = max(position, own), min(end, own + size)
            if low != position or low >= high:
                continue
            whole = file.read(name)
            if whole.dim() != 1 or len(whole) != (bytes_for(size) if bits else size) or bits != (whole.dtype == _BITS):
                raise file.damaged(f"{name} has another size or type than its header says")
            if bits:
                first = (low - own) // 8
                flags = unpack_flags(whole[first : bytes_for(high - own)])
                parts.append(flags[low - own - 8 * first : high - own - 8 * first])
            else:
                parts.append(whole[low - own : high - own])
            position = high
        if position != end:
            raise MamaError(f"{self.where} holds nothing for {name} from element {position} on: the files do not fit.")
        if bits:
            return pack_bits(torch.cat(parts)) if parts else torch.empty(0, dtype=torch.uint8)
        return torch.cat(parts) if parts else torch.empty(0)
