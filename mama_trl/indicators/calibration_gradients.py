"""Where connections are needed, from gradients of the calibration loss: mean |w g| of every connection.

One backward pass per batch; each parameter's gradient is taken up and freed as soon as it is there, so that one
gradient is held at a time, beside one bf16 statistic (2 bytes per prunable connection).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from ..model.language import call, logits_of
from ..model.sequences import Sequences, batches
from ..model.targets import Target
from .formulas import sensitivity


def sensitivities(
    model: nn.Module, rows: Sequences, targets: list[Target], batch_size: int = 8, progress: bool = False
) -> dict[str, Tensor]:
    """Mean over batches of |w g| by target name, (out, in) in bf16.

    Args:
        rows: token ids, int64 (n, sequence_length), or 1-D tensors of any lengths; the loss is the model's own
            next-token cross-entropy.
    """
    parameters = {id(t.parameter): t.parameter for t in targets}
    totals = {key: torch.zeros_like(p.data, dtype=torch.bfloat16) for key, p in parameters.items()}
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    seen = 0

    def take(parameter: nn.Parameter) -> None:
        total = totals[id(parameter)]
        assert parameter.grad is not None  # the hook is called when it has just been accumulated
        total.copy_(torch.lerp(total.float(), sensitivity(parameter.data, parameter.grad), 1.0 / seen))
        parameter.grad = None

    training = model.training
    model.eval()
    handles = []
    try:
        for parameter, *_ in before:
            parameter.requires_grad_(id(parameter) in totals)
            parameter.grad = None
        handles = [p.register_post_accumulate_grad_hook(take) for p in parameters.values()]
        device = next(model.parameters()).device
        for batch in tqdm(batches(rows, batch_size, device), desc="sensitivity", disable=not progress, leave=False):
            seen += 1
            with torch.enable_grad():
                logits = logits_of(call(model, batch))[:, :-1]
                functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten()).backward()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
        model.train(training)
    return {t.name: t.own(totals[id(t.parameter)]) for t in targets}
