"""A block at once is the model's own forward pass."""

import pytest
import torch

from mama_trl.calibration.blockwise import blockwise
from mama_trl.calibration.grams import collect
from mama_trl.calibration.progress import Progress
from mama_trl.errors import MamaError
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import prune

from ..conftest import DENSE, MIXTURES


def test_blockwise_forward_is_the_models_own(make_model, rows):
    """With sparsity 0 the last block's calibration inputs are those of an ordinary forward pass."""
    for architecture in ("llama", "gpt2", "opt", "qwen3"):
        model = make_model(architecture).eval()
        targets = find_targets(model)
        seen = {}
        for measured in blockwise(model, rows[:6], targets, Progress("test", shown=False), batch_size=4):
            seen.update(measured.grams)
        with torch.no_grad():
            plain = collect(model, targets, lambda: model(input_ids=rows[:6]))
        for name, gram in plain.items():
            assert torch.allclose(seen[name].gram, gram.gram, rtol=1e-3, atol=1e-3), (architecture, name)


@pytest.mark.parametrize("architecture", DENSE + MIXTURES)
def test_blockwise_calibration_is_the_models_own_forward_pass(make_model, rows, architecture):
    """Masks, positions, rotary tables, sliding windows and routing are those of an ordinary run."""
    model = make_model(architecture).eval()
    targets = find_targets(model, experts=True)
    seen = {}
    for measured in blockwise(model, rows[:6], targets, Progress("test", shown=False), batch_size=4):
        seen.update(measured.grams)
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        plain = collect(model, targets, lambda: model(input_ids=rows[:6], use_cache=False))
    assert set(seen) == set(plain) == {t.name for t in targets}
    for name, gram in plain.items():
        assert torch.allclose(seen[name].gram, gram.gram, rtol=1e-3, atol=1e-3 * float(gram.gram.abs().max())), name
        assert seen[name].tokens == gram.tokens, name


def test_block_arguments_that_depend_on_the_tokens_are_refused(make_model, rows):
    model = make_model("llama").eval()
    block = model.model.layers[0]
    inner = block.forward
    block.forward = lambda hidden_states, per_token=None, **kwargs: inner(hidden_states, **kwargs)
    outer = model.model.forward
    current = {}

    def forward(input_ids=None, **kwargs):
        current["ids"] = input_ids
        return outer(input_ids=input_ids, **kwargs)

    model.model.forward = forward
    call = type(block).__call__
    block.__class__ = type("Talkative", (type(block),), {
        "__call__": lambda self, *args, **kwargs: call(self, *args, per_token=current["ids"], **kwargs)
    })
    with pytest.raises(MamaError, match="change with the tokens"):
        prune(model, rows[:16], "wanda", 0.5, batch_size=8, progress=False)
