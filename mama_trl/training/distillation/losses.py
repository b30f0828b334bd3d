"""Divergences between teacher and student as pure functions of logits."""

import torch
from torch import Tensor
from torch.nn import functional

_ROWS = 1024  # rows whose fp32 log-probabilities exist at once outside autograd's reach


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) of each row, in nats, times temperature² (Hinton et al., arXiv 1503.02531).

    Args:
        student, teacher: logits (rows, vocabulary), any float dtype; computed in fp32.

    Returns:
        fp32 (rows,).
    """
    parts = []
    for ours, theirs in zip(student.split(_ROWS), teacher.split(_ROWS)):
        log_q = functional.log_softmax(ours.float() / temperature, dim=-1)
        log_p = functional.log_softmax(theirs.float() / temperature, dim=-1)
        parts.append(functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1))
    return torch.cat(parts) * temperature**2


def cross_entropy(logits: Tensor, wanted: Tensor, smoothing: float = 0.0, dft: bool = False) -> Tensor:
    """−log q(wanted) of each row in nats, fp32 (rows,).

    Args:
        smoothing: share of the target that is spread over all tokens.
        dft: times q(wanted), taken as a constant (Dynamic Fine-Tuning, arXiv 2508.05629).
    """
    loss = functional.cross_entropy(logits.float(), wanted, reduction="none", label_smoothing=smoothing)
    return loss * (-loss).exp().detach() if dft else loss


@torch.no_grad()
def entropy_and_hits(logits: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of all rows' distributions in nats, and how many rows' likeliest token is the wanted one: two sums."""
    entropy = torch.zeros((), device=logits.device)
    hits = torch.zeros((), dtype=torch.int64, device=logits.device)
    for rows, tokens in zip(logits.split(_ROWS), wanted.split(_ROWS)):
        log_q = functional.log_softmax(rows.float(), dim=-1)
        entropy -= (log_q.exp() * log_q).sum()
        hits += (rows.argmax(-1) == tokens).sum()
    return entropy, hits
