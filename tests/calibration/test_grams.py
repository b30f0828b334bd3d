"""Grams of layers' inputs, on every architecture, of fused experts too."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mama_trl.calibration.blockwise import blockwise
from mama_trl.calibration.grams import collect
from mama_trl.calibration.progress import Progress
from mama_trl.errors import MamaError
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import prune
from mama_trl.solvers.problem import Gram

from ..conftest import DENSE, MIXTURES
from ..model.test_architectures import OTHERS, SHAPE


@pytest.mark.parametrize("architecture", DENSE + MIXTURES)
def test_a_gram_is_over_what_the_matrix_multiplies(make_model, rows, architecture):
    """Whatever is written into a matrix changes its output by exactly what the gram says: trace(D G Dᵀ)."""
    model = make_model(architecture).eval()
    model.config._experts_implementation = "eager"
    for target in find_targets(model, experts=True):
        if target.expert is not None:
            continue
        inputs = []
        handle = target.module.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
        with torch.no_grad():
            grams = collect(model, [target], lambda: model(input_ids=rows[:2], use_cache=False))
        handle.remove()
        flat = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
        assert torch.allclose(grams[target.name].gram, flat.T @ flat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", MIXTURES)
def test_grams_of_fused_experts_are_over_the_tokens_routed_to_them(make_model, rows, architecture):
    model = make_model(architecture).eval()
    targets = [t for t in find_targets(model, experts=True) if t.expert is not None]
    module = targets[0].module
    routed, stored = [], {}
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: routed.append([*args, *kwargs.values()]), with_kwargs=True
    )
    for measured in blockwise(model, rows[:4], targets, Progress("test", shown=False), batch_size=4):
        stored.update(measured.grams)
    handle.remove()
    states, index, _ = routed[0]
    states, index = states.reshape(-1, states.shape[-1]).float(), index.reshape(-1, index.shape[-1])
    first = [t for t in targets if t.module is module and t.attribute == targets[0].attribute]
    assert sum(stored[t.name].tokens for t in first) == rows[:4].numel() * 2  # top 2 of 4
    for target in first:
        own = states[(index == target.expert).any(-1)]
        assert stored[target.name].tokens == own.shape[0]
        assert torch.allclose(stored[target.name].gram, own.T @ own, rtol=1e-3, atol=1e-3)


def test_a_batched_product_gives_each_expert_the_rows_that_are_not_zero(rows):
    """Llama 4 hands every expert all tokens, those of the others zeroed."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama4_text", **{**SHAPE, **OTHERS["llama4_text"][0]})
    model = AutoModelForCausalLM.from_config(config).eval()
    targets = [t for t in find_targets(model, experts=True) if t.expert is not None]
    module, inputs, grams = targets[0].module, [], {}
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for measured in blockwise(model, rows[:4], targets, Progress("test", shown=False), batch_size=4):
        grams.update(measured.grams)
    handle.remove()
    each = inputs[0].view(4, -1, 32).float()
    first = [t for t in targets if t.attribute == targets[0].attribute]
    assert sum(grams[t.name].tokens for t in first) == rows[:4].numel()  # one expert a token
    for target in first:
        own = each[target.expert]
        assert torch.allclose(grams[target.name].gram, own.T @ own, rtol=1e-3, atol=1e-4)


def test_layers_that_read_one_tensor_share_one_gram(make_model, rows):
    model = make_model("llama").eval()
    shared = {}
    for measured in blockwise(model, rows[:4], find_targets(model), Progress("test", shown=False)):
        shared.update(measured.grams)
    by_kind = {name.split(".")[-2]: gram for name, gram in shared.items() if ".0." in name}
    assert by_kind["q_proj"] is by_kind["k_proj"] is by_kind["v_proj"]
    assert by_kind["gate_proj"] is by_kind["up_proj"]
    assert len({id(gram) for gram in by_kind.values()}) == 4
    assert by_kind["q_proj"].tokens == rows[:4].numel()
    assert isinstance(by_kind["o_proj"], Gram)


def test_inputs_that_overflow_are_said(make_model, rows):
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("inf")
    with pytest.raises(MamaError, match="NaN or infinity during calibration"):
        prune(model, rows[:8], "wanda", 0.5, progress=False)
