"""A model whose blocks stay on disk while one runs is pruned to the very same bits, and no block is left in memory."""

import shutil

import pytest
import torch
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file

from mama_trl import prune
from mama_trl.cli import main
from mama_trl.engines.offload import fetch, give_back, is_offloaded, readable
from mama_trl.errors import MamaError
from mama_trl.evaluation.loading import load_model
from mama_trl.evaluation.placing import placing_of
from mama_trl.masks.maskset import MaskSet
from mama_trl.model.blocks import find_blocks
from mama_trl.model.targets import find_targets
from mama_trl.pruning.duration import rough_seconds, told
from mama_trl.pruning.placement import LocalPlacement
from mama_trl.pruning.resume import FOLDER, fingerprint
from mama_trl.solvers.methods import METHODS
from tests.conftest import tiny
from tests.pruning import test_resume
from tests.pruning.test_resume import arguments, kill_after

folder = test_resume.folder  # a fixture

ROWS = torch.randint(2, 384, (12, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def saved(tmp_path):
    def save(architecture):
        tiny(architecture).save_pretrained(tmp_path / "dense")
        return str(tmp_path / "dense")

    return save


def from_disk(where, tmp_path):
    placing = placing_of(where, "auto", ROWS.numel(), "cpu", "disk")
    return load_model(where, device=placing.device, device_map=placing.device_map, offload_folder=tmp_path / "off")


def in_blocks(model):
    return {parameter.device.type for _, block in find_blocks(model) for parameter in block.parameters()}


@pytest.mark.parametrize("architecture, options", [
    ("llama", {}), ("llama", {"method": "magnitude"}), ("llama", {"method": "sparsegpt"}), ("gpt2", {}),
    ("qwen3", {"method": "alps"}), ("gemma3", {"refine": True}), ("mixtral", {}), ("llama", {"pattern": "2:4"}),
])
def test_blocks_on_disk_give_the_same_bits(architecture, options, saved, tmp_path):
    dense = saved(architecture)
    options = {"sparsity": 0.6, "progress": False, "batch_size": 4, **options}
    whole, parts = load_model(dense, device="cpu"), from_disk(dense, tmp_path)
    assert is_offloaded(parts) and not is_offloaded(whole) and in_blocks(parts) == {"meta"}
    masks = prune(whole, ROWS, **options)
    targets = find_targets(parts, experts=True)
    found = prune(parts, ROWS, placement=LocalPlacement(targets, tmp_path / "off"), **options)
    assert in_blocks(parts) == {"meta"}
    assert found.digest() == masks.digest() and found.sparsity() == masks.sparsity()
    parts.save_pretrained(tmp_path / "pruned")
    again = load_model(str(tmp_path / "pruned"), device="cpu")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert MaskSet.load(tmp_path / "pruned", again).verify() == 0
    with torch.no_grad():
        assert torch.equal(parts(ROWS[:1]).logits, whole(ROWS[:1]).logits)


def test_a_model_that_someone_has_offloaded_is_pruned_as_it_is(saved):
    whole, parts = tiny("llama").eval(), tiny("llama").eval()
    cpu_offload(parts, torch.device("cpu"))
    masks, found = (prune(model, ROWS, sparsity=0.5, progress=False) for model in (whole, parts))
    assert found.digest() == masks.digest()
    with torch.no_grad():
        assert torch.equal(parts(ROWS[:1]).logits, whole(ROWS[:1]).logits)


def test_matrices_that_are_left_out_keep_their_masks(saved, tmp_path):
    dense, halves = saved("llama"), []
    model = load_model(dense, device="cpu")
    prune(model, method="magnitude", sparsity=0.4, target_modules=["mlp"], progress=False)
    model.save_pretrained(tmp_path / "half")
    for again in (load_model(str(tmp_path / "half"), device="cpu"), from_disk(str(tmp_path / "half"), tmp_path)):
        halves.append(prune(again, method="magnitude", sparsity=0.7, target_modules=["self_attn"], progress=False))
    assert halves[0].digest() == halves[1].digest() and len(halves[0].names) == 14
    assert {round(halves[0].sparsity(name), 1) for name in halves[0].names} == {0.4, 0.7}


def test_the_fingerprint_does_not_know_where_weights_lie(saved, tmp_path):
    dense = saved("mixtral")
    assert fingerprint(load_model(dense, device="cpu"), ROWS) == fingerprint(from_disk(dense, tmp_path), ROWS)


def test_what_is_read_is_forgotten_and_what_is_given_back_is_kept(saved, tmp_path):
    model = from_disk(saved("llama"), tmp_path)
    block = find_blocks(model)[0][1]
    weight = block.mlp.up_proj
    with readable(block):
        before = weight.weight.detach().clone()
        with readable(weight):  # nested: the outer one drops
            weight.weight.data.zero_()
        assert not weight.weight.is_meta
    with readable(weight):
        assert torch.equal(weight.weight, before)
    own = fetch(block)
    weight.weight.data.zero_()
    give_back(own, tmp_path / "block.safetensors")
    assert weight.weight.is_meta
    with readable(weight):
        assert not weight.weight.any()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
    assert any(not value.any() for value in load_file(tmp_path / "block.safetensors").values())


def test_what_fits_is_chosen_and_said(saved, monkeypatch):
    dense = saved("llama")
    assert placing_of(dense, "auto", 1000, "cpu").offload == "none"
    monkeypatch.setattr("mama_trl.evaluation.placing.available_memory", lambda: 1000)
    placing = placing_of(dense, "auto", 1000, "cpu")
    assert placing.offload == "disk" and "one block" in placing.said
    assert set(placing.device_map.values()) == {"cpu", "disk"}
    with pytest.raises(MamaError, match="`offload` is 'cpu'"):
        placing_of(dense, "auto", 1000, "cpu", "cpu")
    with pytest.raises(MamaError, match="`device` is 'cuda:77'"):
        placing_of(dense, "auto", 1000, "cuda:77")


def test_the_command_offloads_and_goes_on_after_a_kill_in_either_way(folder, tmp_path, capsys):
    outputs = {}
    for way, before, after in (("whole", None, "none"), ("disk", None, "disk"), ("turned", "none", "disk")):
        output = outputs[way] = tmp_path / way
        if before:
            kill_after(2, arguments(folder, "llama", output, "--offload", before), output)
        assert main(arguments(folder, "llama", output, "--offload", after)) == 0
        assert (output / "config.json").is_file() and not (output / FOLDER).exists()
    said = capsys.readouterr().out
    assert "the other blocks stay in their files" in said and "going on after" in said
    whole = load_file(outputs["whole"] / "model.safetensors")
    for output in outputs.values():
        found = load_file(output / "model.safetensors")
        assert all(torch.equal(value, found[name]) for name, value in whole.items()) and found.keys() == whole.keys()
        assert MaskSet.load(output).digest() == MaskSet.load(outputs["whole"]).digest()


def test_heads_are_removed_in_memory(folder, tmp_path, capsys):
    options = ["--pattern", "heads", "--sparsity", "0.5", "--offload", "disk"]
    assert main(["prune", str(folder / "llama"), "--output", str(tmp_path / "out"), *options]) == 2
    assert "`offload` is 'disk'" in capsys.readouterr().err


def test_the_time_that_is_told_grows_with_the_work(monkeypatch, saved):
    monkeypatch.setattr("mama_trl.pruning.duration.speed", lambda dtype, device: 1e9)
    targets = find_targets(tiny("llama"))
    time = {name: rough_seconds(targets, METHODS[name], 1000, torch.float32, torch.device("cpu")) for name in METHODS}
    assert 0 == time["magnitude"] < time["wanda"] < time["sparsegpt"] < time["mama"] < time["alps"]
    assert rough_seconds(targets, METHODS["wanda"], 2000, torch.float32, torch.device("cpu")) == 2 * time["wanda"]
    # By hand: two passes of 1000 tokens through all weights at 1e9 operations a second, four fifths of it reached.
    weights = sum(target.shape[0] * target.shape[1] for target in targets)
    assert time["wanda"] == pytest.approx(2 * 1000 * 2 * weights / 1e9 / 0.8)
    assert (told(0.2), told(80), told(100), told(6000)) == ("1 seconds", "80 seconds", "2 minutes", "2 hours")


def test_a_model_that_is_refused_once_it_is_loaded_leaves_nothing(folder, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(folder / "llama", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    argv = ["prune", str(broken), "--calibration", str(folder / "train.txt"), "--output", str(tmp_path / "out")]
    assert main([*argv, "--sparsity", "0.5", "--offload", "disk"]) == 2
    assert "holds NaN or infinity" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
