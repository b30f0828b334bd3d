"""The same training run on every engine with two CPU processes, held against one process."""

import json
import re

import pytest
import torch
from safetensors import safe_open

from mama_trl.masks.maskset import MaskSet
from mama_trl.training.checkpoints import newest_whole
from tests.conftest import tiny
from tests.distributed import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
SAME_SCORES = ("matrix", "budget", "row", "global", "2:4")  # computed from what all runs read from one file
# From the engine's own optimizer state or forward pass.
ROUNDED = ("curvature", "bias", "least_squares", "row, least_squares", "mixed")
# Without calibration a rounding difference moves single connections; least squares would spread it over the matrix.
PLAIN = {"indicators": ["magnitude", "sensitivity=0.5"], "redistribution": "none"}
SAVING = {"save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    (result,) = launch.run(folder, "single", 1, ways=[*SAME_SCORES, *ROUNDED], config=PLAIN)
    assert result["engine"] == "single" and result["violations"] == 0
    return folder, result


@pytest.fixture(scope="module", params=launch.ENGINES)
def trained(request, tmp_path_factory, reference):
    engine, folder = request.param, tmp_path_factory.mktemp(request.param)
    ways = [*SAME_SCORES, *ROUNDED]
    options = {"ways": ways, "reference": str(reference[0]), "args": SAVING, "config": PLAIN}
    return engine, folder, launch.run(folder, engine, 2, **options)


def assert_engine(engine, result):
    """Not what was asked for, but what the parameters are."""
    assert result["engine"] == engine and result["world"] == 2
    assert result["parameter"] == ("DTensor" if engine == "fsdp2" else "Parameter")
    assert result["ds_id"] == engine.startswith("zero3")
    assert result["fragment"] == (engine in ("zero1", "zero2"))
    wrapped = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}.get(engine, "DeepSpeedEngine")
    assert result["wrapped"] == wrapped


def relative_difference(ours: dict, theirs: dict) -> float:
    ours, theirs = (torch.cat([values[name].double() for name in sorted(values)]) for values in (ours, theirs))
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_statistics_agree_and_zeros_are_exact(trained, reference):
    engine, folder, results = trained
    for result in results:
        assert_engine(engine, result)
        assert result["violations"] == 0 and result["checked"] == 4
        assert result["sparsity"] == pytest.approx(0.8, abs=1e-3)
        assert result["skipped"] == 0
    assert results[0]["digest"] == results[1]["digest"]
    expected = torch.load(reference[0] / "statistics0.pt")
    found = torch.load(folder / "statistics0.pt")
    assert relative_difference(found[1], expected[1]) < 1e-6
    assert relative_difference(found[2], expected[2]) < 2e-6  # Adam's first step divides small gradients by themselves


def test_masks_agree_with_one_process(trained, reference):
    engine, _, results = trained
    for way, expected in reference[1]["ways"].items():
        found = [result["ways"][way] for result in results]
        assert found[0]["flags"] == found[1]["flags"], way
        assert all(each["violations"] == 0 for each in found), way
        total = sum(len(flags) for flags in expected["flags"].values())
        different = sum(
            a != b for name, flags in expected["flags"].items() for a, b in zip(flags, found[0]["flags"][name])
        )
        print(f"{engine} {way}: {different} of {total} connections differ")
        # A search for masks amplifies rounding in the gram, as every hard-thresholded ADMM does (ALPS as well): masks
        # are not the same, and equally good.
        limit = 0.05 if "least_squares" in way else 1e-4
        assert different <= (0 if way in SAME_SCORES else limit * total), way
        assert found[0]["error"] == pytest.approx(expected["error"], rel=0.1 if "least_squares" in way else 1e-3), way
        if different == 0:
            assert found[0]["weights"] == pytest.approx(expected["weights"], rel=2e-3), way


def test_saved_model_is_ordinary_safetensors_with_exact_zeros(trained):
    engine, folder, _ = trained
    masks = MaskSet.load(folder)  # one process reads what two wrote
    with safe_open(folder / "model.safetensors", "pt") as file:
        for name in masks.names:
            value = file.get_tensor(name)
            assert tuple(value.shape) == masks.shapes[name]
            assert torch.all(value[~masks.mask(name)] == 0) and value[masks.mask(name)].abs().sum() > 0
    assert masks.sparsity() == pytest.approx(0.8, abs=1e-3)


def test_a_dead_rank_ends_the_run_and_resuming_is_exact(trained, tmp_path):
    engine, folder, results = trained
    process = launch.start(tmp_path, engine, 2, args=SAVING, config=PLAIN, kill_at=5)
    assert process.wait(500) != 0
    assert newest_whole(tmp_path).name == "checkpoint-4"
    resumed = launch.run(tmp_path, engine, 2, args=SAVING, config=PLAIN, resume=str(tmp_path / "checkpoint-4"))
    assert [r["digest"] for r in resumed] == [r["digest"] for r in results]
    whole, again = torch.load(folder / "weights0.pt"), torch.load(tmp_path / "weights0.pt")
    for name in whole:
        assert torch.equal(whole[name], again[name]), name


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_one_ranks_nan_gradient_is_left_out_everywhere(engine, tmp_path):
    what = {"kind": "gradient", "rank": 1, "step": 1}
    results = launch.run(
        tmp_path, engine, 2, poison=what, config={"sparsity": 0.0}, args={"max_steps": 2, "logging_steps": 1}
    )
    for result in results:
        assert_engine(engine, result)
        assert result["skipped"] == 1
    assert any(row.get("mama/skipped_steps") == 1 for row in results[0]["logs"])
    statistics = torch.load(tmp_path / "statistics0.pt")
    for name, value in statistics[2].items():
        assert torch.equal(value, statistics[1][name]) and torch.isfinite(value).all()


def test_ranks_that_disagree_stop_the_run(tmp_path):
    process = launch.start(tmp_path, "ddp", 2, poison={"kind": "masks", "rank": 1}, config=PLAIN)
    assert process.wait(500) != 0
    assert "the ranks disagree on the masks" in re.sub(r"\s+", " ", (tmp_path / "log.txt").read_text())


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_bf16(engine, tmp_path, reference):
    results = launch.run(tmp_path, engine, 2, bf16=True)
    for result in results:
        assert_engine(engine, result)
        assert result["violations"] == 0 and result["checked"] == 4
    expected, found = torch.load(reference[0] / "statistics0.pt"), torch.load(tmp_path / "statistics0.pt")
    assert relative_difference(found[1], expected[1]) < 5e-2


def test_conv1d_under_zero3(tmp_path):
    """GPT-2 stores (in, out), so that a shard cuts every output row."""
    ways = ["row", "2:4", "least_squares"]
    (alone,) = launch.run(tmp_path / "single", "single", 1, architecture="gpt2", ways=ways)
    results = launch.run(
        tmp_path / "zero3", "zero3", 2, architecture="gpt2", ways=ways, reference=str(tmp_path / "single")
    )
    assert results[0]["engine"] == "zero3" and results[0]["violations"] == 0
    for way in ways:
        a, b = alone["ways"][way]["flags"], results[0]["ways"][way]["flags"]
        different = sum(x != y for n in a for x, y in zip(a[n], b[n]))
        print(f"gpt2 zero3 {way}: {different} of {sum(map(len, a.values()))} connections differ")
        # Grams added up in another order: one near-tie in the solver can change a few percent of a matrix's support.
        assert different <= (0 if way != "least_squares" else 0.03 * sum(map(len, a.values())))


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_mask_update_holds_one_block_at_a_time(engine, tmp_path, monkeypatch):
    """Beyond its shards: the gathered block, and about a dozen tensors of the sizes of its widest matrix and
    that one's gram, to solve it; nowhere near the whole model."""
    for name, value in (("MMAP_THRESHOLD", 65536), ("TRIM_THRESHOLD", 65536), ("ARENA_MAX", 1)):
        monkeypatch.setenv(f"MALLOC_{name}_", str(value))  # freed memory leaves the process at once
    # How many gathered parameters DeepSpeed keeps in its own forward pass is its setting, 1e9 by default.
    live = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    # As it is by default: the attention's matrices are small enough to stay whole on every rank, the MLP's are not.
    live["stage3_param_persistence_threshold"] = 100_000
    monkeypatch.setenv("MAMA_TEST_ZERO", json.dumps(live))
    results = launch.run(tmp_path, engine, 2, module="memory_worker", blocks=24)
    for result in results:
        assert result["engine"] == engine and result["violations"] == 0
        extra, block, widest = (result[key] for key in ("extra", "block", "widest"))
        print(
            f"{engine}: {extra / 2**20:.1f} MiB extra = {extra / block:.1f} blocks, block {block / 2**20:.1f} MiB, "
            f"widest matrix and gram {widest / 2**20:.1f} MiB, model {result['model'] / block:.0f} blocks"
        )
        assert extra - result["masks"] < 4 * block + 12 * widest < result["model"] / 2


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_frozen_parameters(engine, tmp_path):
    """Norms, a bias and a matrix that do not train: a mask update runs through them, and leaves the matrix alone."""
    options = {
        "frozen": ["norm", "up_proj.bias", "layers.0.mlp.gate_proj"], "ways": ["least_squares"],
        "config": {"exclude_modules": [r"layers\.0\.mlp\.gate_proj"]},
    }
    (alone,) = launch.run(tmp_path / "single", "single", 1, **options)
    results = launch.run(tmp_path / engine, engine, 2, reference=str(tmp_path / "single"), **options)
    for result in results:
        assert_engine(engine, result)
        assert result["violations"] == 0 and result["checked"] == 4
        assert result["sparsity"] == pytest.approx(0.8, abs=1e-3)
    found, expected = results[0]["ways"]["least_squares"], alone["ways"]["least_squares"]
    assert not any("layers.0.mlp.gate_proj" in name for name in found["flags"])
    assert found["kept"] == expected["kept"]
    with safe_open(tmp_path / engine / "model.safetensors", "pt") as file:
        name = "model.layers.0.mlp.gate_proj.weight"
        assert torch.equal(file.get_tensor(name), dict(tiny("llama").named_parameters())[name].data)


def test_two_ranks_checkpoint_is_read_by_one(tmp_path):
    config = {"mask_schedule": "oneshot", "mask_start": 2, "mask_end": None, "mask_interval": None}
    two = launch.run(tmp_path, "ddp", 2, config=config, args={**SAVING, "max_steps": 4})
    (one,) = launch.run(
        tmp_path, "single", 1, config=config, args={**SAVING, "max_steps": 6}, resume=str(tmp_path / "checkpoint-4")
    )
    assert one["digest"] == two[0]["digest"] and one["violations"] == 0
    assert json.loads((tmp_path / "checkpoint-4" / "mama" / "state.json").read_text())["ranks"] == 2


def test_offloaded_optimizer(tmp_path):
    """ZeRO-3 with DeepSpeed's CPU Adam, where that builds."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:
        pytest.skip(f"DeepSpeed's CPU Adam does not build here: {error}")
    results = launch.run(tmp_path, "zero3-offload", 2, ways=["matrix", "least_squares"])
    for result in results:
        assert result["engine"] == "zero3" and result["violations"] == 0 and result["checked"] == 4
        assert all(way["violations"] == 0 for way in result["ways"].values())
