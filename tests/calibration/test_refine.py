"""Refining a block: zeros stay, the held-back error falls, and a killed call goes on bit for bit."""

import pytest
import torch

from mama_trl import MamaConfig, MamaError, prune
from mama_trl.evaluation.perplexity import perplexity
from mama_trl.pruning.resume import KeptProgress, Unfinished

DROPPED = {"redistribution": "none", "budget": "uniform"}  # leaves much to refine


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_refining_keeps_zeros_and_dtypes_and_moves_the_rest(make_model, rows, architecture, dtype):
    plain, model = make_model(architecture).to(dtype), make_model(architecture).to(dtype)
    before = prune(plain, rows, sparsity=0.6, batch_size=4, progress=False, **DROPPED)
    masks = prune(model, rows, sparsity=0.6, batch_size=4, progress=False, refine=True, **DROPPED)
    assert masks.verify(model) == 0 and masks.sparsity() == pytest.approx(before.sparsity(), abs=1e-6)
    assert all(p.dtype == dtype and torch.isfinite(p).all() and p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())
    norms = [name for name, _ in model.named_parameters() if "norm" in name or "ln_" in name]
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert any(not torch.equal(ours[name], theirs[name]) for name in norms)


def test_refining_brings_the_model_nearer_to_the_dense_one(make_model, rows):
    """On other sequences than those it was refined on; of a model whose blocks do something."""
    def distance(model):
        with torch.no_grad():
            return (model(input_ids=rows[48:]).logits - dense).square().mean().item()

    model = make_model("llama")
    for parameter in model.model.layers.parameters():
        parameter.data *= 3
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        dense = model(input_ids=rows[48:]).logits
    prune(model, rows[:48], sparsity=0.7, batch_size=4, progress=False, **DROPPED)
    plain = distance(model)
    model.load_state_dict(state)
    prune(model, rows[:48], sparsity=0.7, batch_size=4, progress=False, refine=True, **DROPPED)
    assert distance(model) < plain
    assert perplexity(model, rows[48:])["nats"] > 0


def test_a_killed_refinement_goes_on_bit_for_bit(make_model, rows, tmp_path):
    class Killed(Exception):
        pass

    class Dying(Unfinished):
        def store(self, *args):
            super().store(*args)
            raise Killed

    options = {"sparsity": 0.6, "refine": True, "batch_size": 4}
    whole, again = make_model("llama"), make_model("llama")
    prune(whole, rows[:16], progress=False, **options)
    state = Dying(tmp_path, options)
    state.begin(again, rows[:16])
    with pytest.raises(Killed):
        prune(again, rows[:16], progress=KeptProgress("test", state, shown=False), **options)
    again, state = make_model("llama"), Unfinished(tmp_path, options)
    state.begin(again, rows[:16])
    assert state.blocks == 1
    prune(again, rows[:16], progress=KeptProgress("test", state, shown=False), **options)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters()))


def test_who_cannot_refine_says_so(make_model, rows):
    with pytest.raises(MamaError, match="`refine` is True, which method Wanda does not take"):
        prune(make_model("llama"), rows, "wanda", refine=True)
    with pytest.raises(MamaError, match="`refine` is true, which is for one-shot pruning"):
        MamaConfig(refine=True)
