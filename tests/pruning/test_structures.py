"""Whole structures: hand-computed choices, exact counts, and a smaller model that is an ordinary one."""

import copy
import json
import logging
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from mama_trl.cli import main
from mama_trl.errors import MamaError
from mama_trl.evaluation.perplexity import perplexity
from mama_trl.pruning.structures.find import find_units
from mama_trl.pruning.structures.remove import prune_structures

from ..conftest import DENSE, MIXTURES
from ..tiny_tokenizer import tiny_tokenizer

# A config with a free head_dim describes fewer heads; these have none.
NO_HEADS = {"gpt2", "opt", "gpt_neox", "gpt_oss"}


@pytest.mark.parametrize("structure", ["neurons", "heads"])
@pytest.mark.parametrize("architecture", DENSE + MIXTURES)
def test_the_smaller_model_is_what_its_config_says(make_model, rows, architecture, structure, tmp_path):
    model = make_model(architecture, groups=2)
    before = model.num_parameters()
    if structure == "heads" and architecture in NO_HEADS:
        with pytest.raises(MamaError, match="no plain config of .* use neurons"):
            prune_structures(model, rows[:16], structure, 0.5, progress=False)
        return
    units = find_units(model, structure)
    cut = 0
    for unit in units:
        gone = unit.count // 2
        cut += gone * unit.size * unit.reader.shape[0]
        for writer, made in zip(unit.writers, unit.rows):
            cut += gone * made.shape[1] * (writer.shape[1] + (writer.bias is not None))
    small = prune_structures(model, rows[:16], structure, 0.5, progress=False)
    assert small.num_parameters() == before - cut and cut > 0
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.num_parameters() == small.num_parameters()
    with torch.no_grad():
        one, other = model.eval()(rows[:2]).logits, again(rows[:2]).logits
    assert float((one - other).abs().max()) < 1e-4
    tied = model.config.tie_word_embeddings
    assert (again.get_output_embeddings().weight is again.get_input_embeddings().weight) == tied
    assert len(again.generate(rows[:1, :4], max_new_tokens=3, do_sample=False)[0]) >= 5  # with a cache


@pytest.fixture(scope="module")
def trained(tokenizer, text):
    """A small Llama after a few dozen steps, so that structures differ in what they do; (make a copy, blocks)."""
    from mama_trl.evaluation.text import blocks

    rows = blocks(tokenizer, text, 32)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8, max_position_embeddings=64, tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(150):
        batch = rows[(step * 8) % 200 : (step * 8) % 200 + 8]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return lambda: copy.deepcopy(model).eval(), rows


@pytest.mark.parametrize("structure", ["neurons", "heads"])
def test_it_beats_random_and_magnitude_structures(trained, structure):
    make, rows = trained
    nats = {}
    for method, redistribution in [("mama", "least_squares"), ("magnitude", "none"), ("random", "none")]:
        small = prune_structures(
            make(), rows[:64], structure, 0.75, method, redistribution=redistribution, progress=False
        )
        nats[method] = perplexity(small, rows[208:232])["nats"]
    assert nats["mama"] < min(nats["magnitude"], nats["random"]), nats


def test_nothing_but_structures_changes_and_counts_are_the_same_in_every_layer(trained):
    make, rows = trained
    model, dense = make(), make()
    small = prune_structures(model, rows[:16], "neurons", 0.3, progress=False)
    assert small.config.intermediate_size == 96 - 29
    for name, value in small.state_dict().items():
        if "mlp" not in name:
            assert torch.equal(value, dense.state_dict()[name]), name
        else:
            assert sorted(value.shape) == [48, 67]


def test_heads_that_the_config_cannot_count_go_to_the_nearest_number(trained, caplog):
    make, rows = trained
    with caplog.at_level(logging.WARNING):  # 48 is no multiple of 5, but of 4 and 6
        small = prune_structures(make(), rows[:16], "heads", 0.375, progress=False)
    assert small.config.num_attention_heads == 6 and small.config.head_dim == 6
    assert "6 of 8 key/value groups are kept in every layer, not 5" in caplog.text


def test_experts_hardly_asked_keep_their_values(make_model, rows, caplog):
    model = make_model("mixtral")
    gate = next(module for name, module in model.named_modules() if name.endswith("layers.1.mlp.gate"))
    with torch.no_grad():
        gate.weight.zero_()  # ties go to the first two
    with caplog.at_level(logging.WARNING):
        prune_structures(model, rows[:16], "neurons", 0.5, progress=False)
    assert "2 of 8 experts saw fewer than 64 calibration tokens" in caplog.text


def auto(model_type: str, **changes):
    shape = {
        "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "eos_token_id": 1,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**shape, **changes}))


@pytest.mark.parametrize(
    "structure, field, left", [("neurons", "intermediate_size", 32), ("heads", "num_key_value_heads", 1)]
)
def test_stacked_layers_whose_shapes_could_be_either(rows, structure, field, left):
    """Phi-3 stacks query, key and value, and gate and up; here both stacks have the same shape."""
    small = prune_structures(auto("phi3"), rows[:16], structure, 0.5, progress=False)
    assert getattr(small.config, field) == left


def test_a_config_that_fits_but_does_not_run_is_refused_before_anything_is_measured(rows):
    """OLMoE's norm over all heads takes its size from the hidden size."""
    mixture = auto("olmoe", num_experts=4, num_experts_per_tok=2)
    before = {name: value.clone() for name, value in mixture.state_dict().items()}
    with pytest.raises(MamaError, match="no plain config"):
        prune_structures(mixture, rows[:16], "heads", 0.5, progress=False)
    assert all(torch.equal(before[name], value) for name, value in mixture.state_dict().items())


def test_bf16_stays_bf16(make_model, rows):
    small = prune_structures(make_model("qwen3", groups=2).bfloat16(), rows[:16], "heads", 0.5, progress=False)
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in small.parameters())


@pytest.mark.parametrize(
    "change, word",
    [
        ({"structure": "layers"}, "pattern"),
        ({"method": "sparsegpt"}, "method"),
        ({"redistribution": "mean"}, "redistribution"),
        ({"sparsity": 1.0}, "sparsity"),
        ({"sparsity": 0.001}, "removes none of the 64 neurons"),
        ({"structure": "heads"}, "removes none of the 1 key/value groups"),
        ({"calibration": None}, "calibration"),
    ],
)
def test_bad_input_is_said(make_model, rows, change, word):
    arguments = {"calibration": rows[:8], "structure": "neurons", **change}
    with pytest.raises(MamaError, match=word):
        prune_structures(make_model("qwen3"), progress=False, **arguments)


def test_command_writes_a_model_that_loads_without_our_package(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(" ".join(f"{a} plus {b} makes {a + b}." for a in range(20) for b in range(20)))
    for model, output, pattern in [("dense", "heads", "heads"), ("heads", "both", "neurons")]:
        options = ["--calibration", str(tmp_path / "text.txt"), "--output", str(tmp_path / output), "--sparsity", "0.5",
                   "--calibration_tokens", "512"]
        assert main(["prune", str(tmp_path / model), "--pattern", pattern, *options]) == 0
    assert "parameters stay (mama, neurons)" in capsys.readouterr().out
    saved = json.loads((tmp_path / "both" / "config.json").read_text())
    assert (saved["num_attention_heads"], saved["num_key_value_heads"], saved["intermediate_size"]) == (2, 1, 32)
    assert not (tmp_path / "both" / "mama").exists() and not (tmp_path / "both" / ".progress").exists()
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; m = A.from_pretrained(sys.argv[1]); "
        "assert 'mama_trl' not in sys.modules; print(m.num_parameters())"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "both")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) == AutoModelForCausalLM.from_pretrained(tmp_path / "both").num_parameters()
    assert main(["prune", str(tmp_path / "dense"), "--pattern", "heads", "--output", str(tmp_path / "x")]) == 2
    assert "calibration" in capsys.readouterr().err
    assert main(["prune", str(tmp_path / "dense"), "--method", "magnitude", "--output", str(tmp_path / "masked")]) == 0
    again = ["prune", str(tmp_path / "masked"), "--pattern", "heads", "--output", str(tmp_path / "x"), *options[:2]]
    assert main(again) == 2
    assert "has masks, which do not fit" in capsys.readouterr().err
