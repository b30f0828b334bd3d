"""Every method on every architecture: the same calibration as the model itself, exact counts, an ordinary model."""

import logging

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mama_trl.errors import MamaError, warn_once
from mama_trl.evaluation.perplexity import perplexity
from mama_trl.masks.maskset import MaskSet
from mama_trl.model.experts import fused_experts
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import METHODS, prune
from mama_trl.pruning.structures.remove import prune_structures
from mama_trl.selection.threshold import kept_count

from ..conftest import DENSE, MIXTURES


@pytest.mark.parametrize("architecture", DENSE + MIXTURES)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_every_architecture(make_model, rows, architecture, method, tmp_path):
    model = make_model(architecture)
    untouched = {n: p.clone() for n, p in model.named_parameters()
                 if "embed" in n or "wte" in n or "wpe" in n or "lm_head" in n or "norm" in n or "ln_" in n
                 or "router" in n or n.endswith("mlp.gate.weight")}
    tied = model.config.get_text_config().tie_word_embeddings
    masks = prune(model, rows[:16], method, 0.6, progress=False, budget="uniform")
    targets = find_targets(model, experts=True)
    assert set(masks.names) == {t.parameter_name for t in targets}
    assert masks.verify(model) == 0
    for target in targets:
        mask = masks.mask(target.parameter_name)
        kept = target.oriented(mask if target.expert is None else mask[target.expert])
        if method == "wanda":  # the same number in every row
            assert kept.sum() == pytest.approx(0.4 * kept.numel(), rel=0.05)
        else:
            assert int(kept.sum()) == kept_count(kept.numel(), 0.6), target.name
    assert len(untouched) > 2
    for name, before in untouched.items():
        assert torch.equal(dict(model.named_parameters())[name], before), name
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert torch.isfinite(torch.tensor(perplexity(model, rows[:4])["nats"]))
    if method == "mama":  # saved, it is an ordinary model, whose masks fit it
        model.save_pretrained(tmp_path)
        masks.save(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        assert MaskSet.load(tmp_path).verify(again) == 0
        with torch.no_grad():
            difference = float((again(rows[:2]).logits - model.eval()(rows[:2]).logits).abs().max())
        assert difference < 1e-5


def test_experts_stored_input_first_are_turned(make_model):
    for architecture, input_first in (("mixtral", False), ("gpt_oss", True)):
        model = make_model(architecture)
        target = next(t for t in find_targets(model, experts=True) if t.expert == 2)
        stored = target.parameter.data[2]
        assert target.transposed == input_first and target.shape[1] == model.config.hidden_size
        assert torch.equal(target.matrix, stored.T if input_first else stored)
        target.matrix.zero_()
        assert int(target.parameter.data[2].count_nonzero()) == 0 and int(target.parameter.data[1].count_nonzero()) > 0


def test_experts_that_saw_too_few_tokens_are_said_and_pruned_by_magnitude(make_model, rows, caplog):
    model = make_model("mixtral")
    gate = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.gate"))
    with torch.no_grad():
        gate.weight.copy_(torch.zeros_like(gate.weight))  # ties go to the first two: the others see nothing
    dense = {t.name: t.matrix.clone() for t in find_targets(model, experts=True)}
    with caplog.at_level(logging.WARNING):
        prune(model, rows[:16], "mama", 0.5, progress=False)
    said = [r.getMessage() for r in caplog.records if "calibration tokens" in r.getMessage()]
    assert len(said) == 1 and "4 of " in said[0] and "layers.1.mlp.experts.gate_up_proj[" in said[0]
    for target in find_targets(model, experts=True):
        if target.block == 1 and target.expert is not None:
            kept = target.matrix != 0
            unchanged = torch.equal(target.matrix, dense[target.name] * kept)
            assert unchanged == (f"{target.name}" in said[0])


def test_training_leaves_fused_experts_dense_and_says_so_once(make_model, caplog):
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = find_targets(make_model("mixtral"))
    assert all(t.parameter.dim() == 2 and t.expert is None for t in found) and len(found) == 8
    assert sum("stay dense" in r.getMessage() for r in caplog.records) == 1


def test_routers_are_not_targets_and_convolutions_no_experts():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 3, bias=False)
            self.shared_gate = nn.Linear(8, 1, bias=False)
            self.experts = nn.ModuleList(nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)]) for _ in range(3))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Mixture() for _ in range(4))

    names = [t.name for t in find_targets(Model())]
    assert len(names) == 24 and not any("gate" in name for name in names)
    assert fused_experts(nn.Conv1d(4, 4, 3)) == {}


def test_evaluation_counts_the_zeros_of_experts(make_model):
    from mama_trl.evaluation.size import sparsity_by_kind, sparsity_by_matrix

    model = make_model("mixtral")
    prune(model, None, "magnitude", 0.75, progress=False)
    assert sparsity_by_kind(model)["all"] == pytest.approx(0.75, abs=1e-3)
    parameters = {name: p.numel() for name, p in model.named_parameters()}
    assert all(parameters[row["name"]] == row["size"] for row in sparsity_by_matrix(model))
    assert "experts.down_proj" in sparsity_by_kind(model)
SHAPE = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 1,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
GPT = {
    "vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8, "bos_token_id": 1,
    "eos_token_id": 1,
}
OTHERS = {  # model type: (changes of the config, fused expert matrices, neurons can go, heads can go)
    "phi": ({}, 0, True, True),
    "phi3": ({}, 0, True, True),
    "olmo": ({}, 0, True, True),
    "olmo2": ({}, 0, True, False),
    "starcoder2": ({}, 0, True, True),
    "stablelm": ({}, 0, True, False),
    "cohere": ({}, 0, True, True),
    "granite": ({}, 0, True, True),
    "glm4": ({}, 0, True, True),
    "smollm3": ({}, 0, True, True),
    "nemotron": ({}, 0, True, True),
    "gptj": (GPT, 0, True, False),
    "codegen": (GPT, 0, True, False),
    "bloom": ({"n_layer": 2, "n_head": 4}, 0, False, False),
    "olmoe": (EXPERTS, 16, True, False),
    "qwen2_moe": ({**EXPERTS, "shared_expert_intermediate_size": 24}, 16, True, True),
    "granitemoe": ({"num_local_experts": 4, "num_experts_per_tok": 2}, 16, True, True),
    "deepseek_v3": (
        {**EXPERTS, **LATENT, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
         "num_key_value_heads": 4, "head_dim": 4},
        8, False, False,
    ),
    "llama4_text": (  # its experts get all tokens in one batched product
        {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "moe_layers": [1]},
        8, False, True,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OTHERS)
def test_others(rows, model_type):
    changes, fused, neurons, heads = OTHERS[model_type]

    def make():
        torch.manual_seed(0)
        own = {} if changes is GPT else SHAPE
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**own, **changes}))

    model = make()
    assert sum(t.expert is not None for t in find_targets(model, experts=True)) == fused
    masks = prune(model, rows[:16], "mama", 0.5, progress=False)
    assert masks.verify(model) == 0 and masks.sparsity() == pytest.approx(0.5, abs=1e-3)
    for structure, possible in (("neurons", neurons), ("heads", heads)):
        model = make()
        if possible:
            assert prune_structures(model, rows[:16], structure, 0.5, progress=False).num_parameters() < (
                model.num_parameters()
            )
        else:
            with pytest.raises(MamaError, match=f"`pattern` is {structure}"):
                prune_structures(model, rows[:16], structure, 0.5, progress=False)
