"""Calibration sequences: token ids of documents as the model meets them, of any lengths.

They are an int64 tensor (n, sequence_length), or a list of 1-D tensors. Nothing is padded and nothing is joined: a
batch holds sequences of one length, so that every token that is run is a real one, at its own position, and sees only
its own document.
"""

from typing import Iterator, Optional, Sequence, Union

import torch
from torch import Tensor

from ..engines import ranks
from ..errors import MamaError, shown

Sequences = Union[Tensor, Sequence[Tensor]]


def check_sequences(sequences: Optional[Sequences]) -> None:
    """Raises `MamaError` for calibration that is given and is no token ids, or too few to predict any."""
    if sequences is None:
        return
    whole = isinstance(sequences, Tensor)
    rows = [sequences] if whole else sequences
    if not isinstance(rows, (list, tuple)) or not all(_are_ids(row, 2 if whole else 1) for row in rows):
        found = list(sequences.shape) if whole else shown(sequences)
        raise MamaError(
            f"`calibration` is {found}: give token ids, whole numbers of shape (n, sequence_length), or a list of 1-D "
            "tensors."
        )
    if not sum(row.numel() for row in rows) or min(row.shape[-1] for row in rows) < 2:
        shape = list(sequences.shape) if whole else [list(row.shape) for row in rows[:3]]
        raise MamaError(f"`calibration` has shape {shape}: give sequences of at least two tokens.")


def _are_ids(row: object, dimensions: int) -> bool:
    return isinstance(row, Tensor) and row.dim() == dimensions and row.dtype in (torch.int64, torch.int32)


def spread_evenly(sequences: Sequences, count: int) -> Sequences:
    """At most `count` sequences, evenly from all: the first may be of one kind of text, the last of another."""
    if count >= len(sequences):
        return sequences
    if not isinstance(sequences, Tensor):
        return [sequences[i * len(sequences) // count] for i in range(count)]
    return sequences[torch.arange(count, device=sequences.device) * len(sequences) // count]


def tokens_in(sequences: Sequences) -> int:
    return sequences.numel() if isinstance(sequences, Tensor) else sum(row.numel() for row in sequences)


def batches(sequences: Sequences, batch_size: int, device: torch.device) -> list[Tensor]:
    """Batches int64 (at most `batch_size`, L) of sequences of one length each, on `device`; longer ones come first."""
    if isinstance(sequences, Tensor):
        return list(sequences.to(device).split(batch_size))
    by_length: dict[int, list[Tensor]] = {}
    for row in sequences:
        if row.numel():
            by_length.setdefault(row.numel(), []).append(row)
    return [
        batch for length in sorted(by_length, reverse=True)
        for batch in torch.stack(by_length[length]).to(device).split(batch_size)
    ]


def documents(
    ids: Tensor, real: Optional[Tensor] = None, positions: Optional[Tensor] = None, bounds: Optional[Tensor] = None,
    context: Optional[int] = None, without: Sequence[int] = (),
) -> Iterator[Tensor]:
    """The sequences in a batch (n, L) of token ids, 1-D int64 on the CPU: one a row, or more where a row is packed.

    Sequences of one token are left out: nothing is predicted from them but a next document, and padding of a packed row
    looks like that.

    Args:
        real: (n, L), 0 where there is padding.
        positions: (n, L) or (1, L); a new document begins where they do not grow.
        bounds: where the documents of one flattened row begin, and its end: (documents + 1,).
        context: longer sequences are cut into pieces of so many tokens.
        without: ids that are left out, such as placeholders of images.
    """
    ids = ids.detach().to("cpu", torch.int64)
    starts = torch.zeros(ids.shape, dtype=torch.bool)
    if bounds is not None and len(ids) == 1 and bounds.dim() == 1 and positions is None:
        inner = bounds.detach().cpu()[:-1].long()
        starts[0, inner[inner < ids.shape[1]]] = True
    if positions is not None:
        positions = positions.detach().cpu().expand(ids.shape)
    keep = torch.ones_like(starts) if real is None else real.detach().cpu().bool()
    if len(without):
        keep = keep & ~torch.isin(ids, torch.tensor(list(without)))
    for row, kept, begins, places in zip(ids, keep, starts, ids if positions is None else positions):
        row, begins, places = row[kept], begins.cumsum(0)[kept].diff() > 0, places[kept].diff() <= 0
        cuts = (begins if positions is None else places).nonzero().flatten() + 1
        for piece in row.tensor_split(cuts):
            for part in piece.split(context or len(piece) or 1):
                if len(part) > 1:
                    yield part.clone()


def own_share(given: Optional[Sequences], seen: Sequences, device: torch.device) -> Optional[Sequences]:
    """This rank's part of the calibration sequences `given` to all, or else those it has `seen` itself.

    They may differ in number and length from those of another rank. None, on every rank, where one rank has none.
    """
    everyone = ranks.everyone()
    own = seen
    if given is not None:
        own = given[ranks.rank(everyone) :: ranks.size(everyone)] if len(given) >= ranks.size(everyone) else given
    return own if ranks.smallest(tokens_in(own), everyone, device) else None
