"""Remembers the sequences of recent training batches, for calibration on what the model trains on."""

from pathlib import Path
from typing import Optional

import torch
from torch import Tensor, nn

from ..engines import ranks
from ..masks.files import FOLDER, file_name, files_of
from ..masks.tensors import TensorFile, write_tensors
from ..model.language import context_length, ids_in, path_to, placeholder_ids, token_embedding
from ..model.sequences import documents

STEM = "inputs"
_MASK, _POSITIONS, _BOUNDS = "attention_mask", "position_ids", "cu_seq_lens_q"


class InputCapture:
    """Hooks that keep the newest sequences which the model was trained on, some `tokens` token ids in all.

    The ids are read where every trainer passes them: at the token embedding. Padding and the bounds of packed documents
    are what the modules above it were called with. Passes without gradients (generation, evaluation, reference
    log-probabilities) are left out.
    """

    def __init__(self, model: nn.Module, tokens: int):
        self._model, self._tokens = model, tokens
        self._context, self._placeholders = context_length(model), placeholder_ids(model)
        self._sequences: list[Tensor] = []  # 1-D, newest last, on the CPU
        self._handles: list = []
        self._call: Optional[dict] = None  # of the forward pass that runs: what surrounds its token ids

    def start(self) -> None:
        if self._handles:
            return
        embedding = token_embedding(self._model)
        above = path_to(self._model, embedding) if embedding is not None else [self._model]
        for module in above:
            self._handles.append(module.register_forward_pre_hook(self._entered, with_kwargs=True))
        if embedding is not None:
            self._handles.append(embedding.register_forward_pre_hook(self._embedded))
        for module in above:
            self._handles.append(module.register_forward_hook(self._left, always_call=True))

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # A compiled model must run these as they are, instead of what they did when it was traced.

    @torch.compiler.disable
    def _entered(self, module, args, kwargs):
        """A module above the embedding is called: its arguments say what is padding and where documents begin."""
        if not self._wanted(module):
            return
        if self._call is None:
            self._call = {"outermost": module, "ids": ids_in(module, args, kwargs)}
        self._call |= {
            name: kwargs[name] for name in (_MASK, _POSITIONS, _BOUNDS) if isinstance(kwargs.get(name), Tensor)
        }

    @torch.compiler.disable
    def _embedded(self, module, args):
        ids = ids_in(module, args, {})
        if ids is not None and self._wanted(module):
            self._keep(ids, self._call or {})
            if self._call is not None:
                self._call["ids"] = None

    @torch.compiler.disable
    def _left(self, module, args, out):
        if self._call is not None and self._call["outermost"] is module:
            call, self._call = self._call, None
            # The embedding was not called as a module, or the model does not say which it is.
            if call["ids"] is not None and out is not None:
                self._keep(call["ids"], call)

    def _wanted(self, module: nn.Module) -> bool:
        return bool(self._handles) and torch.is_grad_enabled() and module.training

    def _keep(self, ids: Tensor, call: dict) -> None:
        mask, positions, bounds = call.get(_MASK), call.get(_POSITIONS), call.get(_BOUNDS)
        fits = positions is not None and positions.dim() == 2 and positions.shape[-1] == ids.shape[-1]
        self._sequences += documents(
            ids, mask if mask is not None and mask.shape == ids.shape else None,
            positions if fits and len(positions) in (1, len(ids)) else None, bounds, self._context, self._placeholders,
        )
        total = sum(len(row) for row in self._sequences)
        while len(self._sequences) > 1 and total - len(self._sequences[0]) >= self._tokens:
            total -= len(self._sequences.pop(0))

    def sequences(self) -> list[Tensor]:
        """The newest sequences, 1-D, whole, up to the asked number of tokens (at least one, cut to it if need be)."""
        found: list[Tensor] = []
        left = self._tokens
        for row in reversed(self._sequences):
            if found and len(row) > left:
                break
            found.append(row[: max(left, 2)])
            left -= len(row)
        return found[::-1]

    def save(self, folder: str | Path) -> None:
        """Writes this rank's sequences into `folder/mama/`; ranks see different batches, so each keeps its own."""
        if not self._handles or not self._sequences:
            return
        lengths = torch.tensor([len(row) for row in self._sequences])
        tensors = {"tokens": torch.cat(self._sequences), "lengths": lengths}
        path = Path(folder) / FOLDER / file_name(STEM, ranks.everyone())
        write_tensors(path, tensors, {"format": "mama-inputs-3"})

    def load(self, folder: str | Path) -> None:
        """Takes up a rank's sequences; with another number of ranks they are dealt out again.

        Raises `MamaError` if a file is damaged.
        """
        group = ranks.everyone()
        paths = files_of(Path(folder) / FOLDER, STEM)[ranks.rank(group) :: ranks.size(group)]
        self._sequences = [row for path in paths for row in _read(path)]


def _read(path: Path) -> list[Tensor]:
    """The sequences of a file that `save` wrote. Raises `MamaError` if it is damaged."""
    file = TensorFile(path, "inputs file", "delete it, so that the masks are calibrated on the next batches")
    tokens, lengths = file.read("tokens"), file.read("lengths") if "lengths" in file.names else file.read("length")
    if tokens.dtype != torch.int64 or tokens.dim() != 1 or lengths.dtype != torch.int64:
        raise file.damaged("it holds no token ids and lengths")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < 1 << 31:
        raise file.damaged("it holds no token ids")
    if "lengths" not in file.names:  # an earlier version's: all tokens, and the longest row's length
        length = max(1, min(int(lengths.max()), len(tokens)))
        return list(tokens[: len(tokens) // length * length].split(length))
    if lengths.dim() != 1 or (len(lengths) and int(lengths.min()) < 1) or int(lengths.sum()) != len(tokens):
        raise file.damaged("its lengths are not those of its tokens")
    return list(tokens.split(lengths.tolist()))
