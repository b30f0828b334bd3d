"""Remembers the token ids of recent training batches, for calibration on what the model trains on."""

from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from ..engines import ranks
from ..masks.files import FOLDER, file_name, files_of
from ..masks.tensors import TensorFile, write_tensors

STEM = "inputs"


class InputCapture:
    """A forward pre-hook that keeps the newest `tokens` token ids which the model was trained on.

    Forward passes without gradients (generation, evaluation, reference log-probabilities) are left out.
    """

    def __init__(self, model: nn.Module, tokens: int):
        self._model = model
        self._tokens = tokens
        self._batches: list[Tensor] = []  # 1-D, padding removed, newest last, on the CPU
        self._length = 0  # longest row seen
        self._handle = None

    def start(self) -> None:
        if self._handle is None:
            self._handle = self._model.register_forward_pre_hook(self._hook, with_kwargs=True)

    def stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _hook(self, module, args, kwargs):
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or not torch.is_grad_enabled() or not module.training or ids.dim() != 2:
            return
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.shape == ids.shape:
            flat = ids[mask.bool()]
        else:
            flat = ids.reshape(-1)
        self._length = max(self._length, ids.shape[1])
        self._batches.append(flat.detach().to("cpu", torch.int64))
        while sum(b.numel() for b in self._batches[1:]) >= self._tokens:
            self._batches.pop(0)

    def rows(self) -> Optional[Tensor]:
        """int64 (n, L): the newest tokens, joined and cut into rows of the training length; None if too few."""
        if not self._batches:
            return None
        flat = torch.cat(self._batches)[-self._tokens :]
        length = min(self._length, flat.numel())
        return flat[: flat.numel() // length * length].view(-1, length)

    def save(self, folder: str | Path) -> None:
        """Writes this rank's tokens into `folder/mama/`; ranks see different batches, so each keeps its own."""
        if self._handle is None or not self._batches:
            return
        tensors = {"tokens": torch.cat(self._batches), "length": torch.tensor(self._length)}
        path = Path(folder) / FOLDER / file_name(STEM, ranks.everyone())
        write_tensors(path, tensors, {"format": "mama-inputs-2"})

    def load(self, folder: str | Path) -> None:
        """Takes up a rank's tokens; with another number of ranks they are dealt out again.

        Raises `MamaError` if a file is damaged.
        """
        group = ranks.everyone()
        paths = files_of(Path(folder) / FOLDER, STEM)[ranks.rank(group) :: ranks.size(group)]
        stored = [_read(path) for path in paths]
        self._batches = [tokens for tokens, _ in stored]
        self._length = max((length for _, length in stored), default=0)


def _read(path: Path) -> tuple[Tensor, int]:
    """Token ids (1-D) and the longest row of a file that `save` wrote. Raises `MamaError` if it is damaged."""
    file = TensorFile(path, "inputs file", "delete it, so that the masks are calibrated on the next batches")
    tokens, length = file.read("tokens"), file.read("length")
    if tokens.dtype != torch.int64 or tokens.dim() != 1 or length.numel() != 1 or not 1 <= int(length) <= 1 << 31:
        raise file.damaged("it holds no token ids and length")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < 1 << 31:
        raise file.damaged("it holds no token ids")
    return tokens, int(length)
