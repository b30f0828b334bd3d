"""Files of tensors that notice damage: safetensors with a checksum of every tensor and of the header itself."""

import json
import logging
import zlib
from pathlib import Path
from typing import Any, Iterator, Optional

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..disk.writing import write_atomically
from ..errors import MamaError, first_line, warn_once

logger = logging.getLogger(__name__)
# Of the tensors, 8 hexadecimal digits each in the order of their names, and of all other entries of the header.
CHECKSUMS, CHECKSUM = "checksums", "checksum"
# Written before there were checksums: read all the same, which is said once.
WITHOUT = (None, "mama-masks-2", "mama-statistics-2", "mama-packed-1")
_CHUNK = 1 << 24


def write_tensors(path: str | Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> Path:
    """Writes a file that is whole or not there; returns its path.

    Args:
        tensors: on any device; contiguous copies are written.
        header: JSON values by name, among them `format`.
    """
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    entries = {**header, CHECKSUMS: "".join(f"{checksum(name, tensors[name]):08x}" for name in sorted(tensors))}
    metadata = {name: json.dumps(value) for name, value in entries.items()}
    metadata[CHECKSUM] = json.dumps(_header_checksum(metadata))
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
    return path


def read_tensors(path: str | Path, what: str, mend: str) -> dict[str, Tensor]:
    """All tensors of a file that `write_tensors` left; see `TensorFile`."""
    file = TensorFile(path, what, mend)
    return {name: file.read(name) for name in file.names}


class TensorFile:
    """A file that `write_tensors` left, each of whose tensors is compared with its checksum when it is first read.

    Args:
        what: says in sentences what the file is, such as "mask file".
        mend: says what to do about a damaged one, such as "delete it or restore it".

    Raises:
        MamaError: the file cannot be read, or is damaged.
    """

    def __init__(self, path: str | Path, what: str, mend: str):
        self.path, self._what, self._mend = Path(path), what, mend
        try:
            self._file = safe_open(self.path, "pt")
            self.names = list(self._file.keys())
            metadata = self._file.metadata() or {}
            self.header: dict[str, Any] = {name: json.loads(value) for name, value in _plain(metadata).items()}
            stored = self.header.pop(CHECKSUM, None)
            digits = self.header.pop(CHECKSUMS, None)
            self._checksums: Optional[dict[str, int]] = None
            if stored is not None or self.header.get("format") not in WITHOUT:
                if stored != _header_checksum(metadata) or len(digits) != 8 * len(self.names):
                    raise ValueError("its header is not what was written")
                numbers = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
                self._checksums = dict(zip(sorted(self.names), numbers))
        except Exception as error:  # safetensors, JSON and the file system each have their own
            raise self.damaged(first_line(error)) from None
        if self._checksums is None:
            warn_once(logger, f"{self.path} is of an earlier version, without checksums: damage would go unnoticed.")
        self._good: set[str] = set()

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU. Raises `MamaError` if it is missing or not what was written."""
        tensor = self._get(name)
        if self._checksums is not None and name not in self._good:
            if checksum(name, tensor) != self._checksums[name]:
                raise self.damaged(f"{name} is not what was written")
            self._good.add(name)
        return tensor

    def damaged(self, reason: str) -> MamaError:
        """The error that names this file."""
        return MamaError(f"{self.path} is no readable {self._what} ({reason}): {self._mend}.")

    def _get(self, name: str) -> Tensor:
        if name not in self.names:
            raise self.damaged(f"it has no {name}")
        try:
            return self._file.get_tensor(name)
        except Exception as error:
            raise self.damaged(first_line(error)) from None


def checksum(name: str, tensor: Tensor) -> int:
    """CRC-32 of a tensor on the CPU, with its name, dtype and shape."""
    total = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
    for piece in _pieces(tensor):
        total = zlib.crc32(piece, total)
    return total


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    flat = tensor.reshape(-1)
    if flat.numel():
        for part in flat.view(torch.uint8).split(_CHUNK):
            yield memoryview(part.numpy())


def _plain(metadata: dict[str, str]) -> dict[str, str]:
    """Metadata as JSON; a format of one word, as earlier versions wrote it, is no JSON."""
    return {
        name: json.dumps(value) if name == "format" and not value.startswith('"') else value
        for name, value in metadata.items()
    }


def _header_checksum(metadata: dict[str, str]) -> int:
    rest = sorted((name, value) for name, value in metadata.items() if name != CHECKSUM)
    return zlib.crc32(json.dumps(rest).encode())
