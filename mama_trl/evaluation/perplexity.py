"""Perplexity over fixed blocks."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm


@torch.no_grad()
def perplexity(model: nn.Module, rows: Tensor, batch_size: int = 8, progress: bool = False) -> dict:
    """exp of the mean negative log-likelihood over positions 1 to L−1 of each block.

    Args:
        model: causal language model; put into evaluation mode for the time being.
        rows: token ids, int64 (n, L).

    Returns:
        `perplexity`, `nats` (mean per token), `tokens` (scored), `sequence_length`.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for batch in tqdm(rows.split(batch_size), desc="perplexity", disable=not progress, leave=False):
        batch = batch.to(device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum")
        total += loss.double()
    model.train(training)
    tokens = rows.shape[0] * (rows.shape[1] - 1)
    nats = total.item() / tokens
    return {
        "perplexity": math.exp(min(nats, 700.0)),
        "nats": nats,
        "tokens": tokens,
        "sequence_length": rows.shape[1],
    }
