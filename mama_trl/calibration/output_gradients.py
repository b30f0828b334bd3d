"""Where the loss listens: the mean square of its gradient at each output of each layer, from a few sequences.

No weight needs a gradient for that, so the backward pass costs as much as a forward one and holds neither weights'
gradients nor optimizer states; each block is run anew when its turn comes, so that one block's activations are held at
a time. Together with what an input can be replaced by (`worth.py`) it says what a connection's loss costs: the diagonal
of a Kronecker-factored Fisher matrix, as in The LLM Surgeon (van der Ouderaa et al., arXiv 2312.17244).
"""

from contextlib import ExitStack, contextmanager, nullcontext
from typing import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ..engines.offload import readable, running_device
from ..model.blocks import find_blocks
from ..model.language import call
from ..model.runner import computing, experts_one_by_one
from ..model.sequences import Sequences, batches
from ..model.targets import Target

LENGTH = 256  # tokens of a sequence that are read: bounds the logits, tokens x vocabulary in the model's dtype
CHUNK = 32  # tokens whose softmax is computed at once, in fp32


def output_gradients(
    model: nn.Module, sequences: Sequences, targets: list[Target], progress: bool = False
) -> dict[str, Tensor]:
    """Mean over tokens of the squared gradient of the summed next-token cross-entropy, (out,) fp32 by target name.

    Of a fused expert the mean is over all tokens, those not routed to it counting as zero. A layer that no token
    reaches has zeros.
    """
    device = running_device(model)
    sums = {t.name: torch.zeros(t.shape[0], device=device if t.parameter.is_meta else t.device) for t in targets}
    tokens = 0

    def listen(target: Target, outputs: Tensor) -> None:
        def take(gradient: Tensor) -> None:
            sums[target.name] += gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0)

        if outputs.requires_grad:
            outputs.register_hook(take)

    outside = [target for target in targets if target.block is None]
    with (
        _inputs_only(model), _one_block_at_a_time(model, targets, listen), _listening(outside, listen),
        experts_one_by_one(targets),
    ):
        parts = [part[:, :LENGTH] for part in batches(sequences, 1, device)]
        for part in tqdm(parts, desc="gradients", disable=not progress, leave=False):
            logits = call(model, part).logits
            logits.backward(_gradient_of_loss(logits.detach(), part))
            del logits
            tokens += part.numel()
    return {name: value / max(tokens, 1) for name, value in sums.items()}


def _gradient_of_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Gradient of the summed next-token cross-entropy at the logits, in their dtype: softmax minus one at the next
    token. A few tokens at a time, so that nothing of the vocabulary's size is held in fp32 for all of them."""
    gradient = torch.zeros_like(logits)
    for begin in range(0, tokens.shape[1] - 1, CHUNK):
        end = min(begin + CHUNK, tokens.shape[1] - 1)
        part = logits[:, begin:end].float().softmax(-1)
        following = tokens[:, begin + 1 : end + 1].unsqueeze(-1)
        gradient[:, begin:end] = part.scatter_add_(-1, following, -torch.ones_like(part[..., :1]))
    return gradient


@contextmanager
def _inputs_only(model: nn.Module) -> Iterator[None]:
    """Gradients flow from the embedded tokens on, and to no weight."""
    training, before = model.training, [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    handle = model.get_input_embeddings().register_forward_hook(lambda _, args, out: out.detach().requires_grad_())
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter, required in before:
            parameter.requires_grad_(required)
        model.train(training)


@contextmanager
def _one_block_at_a_time(
    model: nn.Module, targets: list[Target], listen: Callable[[Target, Tensor], None]
) -> Iterator[None]:
    """Each decoder block keeps its inputs alone and is run anew in the backward pass; its weights, where they are
    elsewhere, are fetched for each of the two."""

    def kept_small(block: nn.Module, forward: Callable, own: list[Target]) -> Callable:
        def whole(*args, **kwargs):
            with readable(block), _listening(own, listen):
                return forward(*args, **kwargs)

        return lambda *args, **kwargs: checkpoint(whole, *args, use_reentrant=False, **kwargs)

    with ExitStack() as stack:
        for number, (_, block) in enumerate(find_blocks(model)):
            own = [t for t in targets if t.block == number]
            stack.enter_context(computing(block, kept_small(block, block.forward, own)))
        yield


@contextmanager
def _listening(targets: list[Target], listen: Callable[[Target, Tensor], None]) -> Iterator[None]:
    """Calls `listen(target, outputs)` for each output of a target that the backward pass will come by."""
    linear = [t for t in targets if t.expert is None]
    fused = [t for t in targets if t.expert is not None]
    with ExitStack() as stack:
        for target in linear:
            handle = target.module.register_forward_hook(lambda _, args, out, t=target: listen(t, out))
            stack.callback(handle.remove)
        stack.enter_context(_ExpertOutputs(fused, listen) if fused else nullcontext())
        yield


class _ExpertOutputs(TorchFunctionMode):
    """Calls `listen` with the outputs of matrix products with a slice of fused expert weights, while it is active."""

    def __init__(self, targets: list[Target], listen: Callable[[Target, Tensor], None]):
        super().__init__()
        self._targets = {t.parameter.data[t.expert].data_ptr(): t for t in targets}
        self._listen = listen

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in args[1:2]:
            target = self._targets.get(value.data_ptr()) if isinstance(value, Tensor) and value.dim() == 2 else None
            if target is not None and isinstance(found, Tensor) and found.shape[-1:] == target.shape[:1]:
                self._listen(target, found)
        return found
