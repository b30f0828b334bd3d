"""Short rows, of another number and of other lengths on each rank, on every engine and in every trainer."""

import math

import pytest

from tests.distributed import launch
from tests.peers import made
from tests.peers.files import pruned_names, share, zeros_in

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PROBE = 32  # calibration's probe is of so many tokens: rows here are shorter


def check(results, folder, engine, same_lengths: bool = False):
    for result in results:
        assert result["engine"] == engine and result["world"] == len(results)
        assert result["violations"] == 0 and result["checked"] == 3
        assert result["sparsity"] == pytest.approx(0.8, abs=0.01)
        assert result["losses"] and all(math.isfinite(loss) for loss in result["losses"])
        assert result["lengths"] and result["lengths"][-1] < PROBE + 32
    assert len({result["digest"] for result in results}) == 1
    names = pruned_names(folder / "out")
    assert share(zeros_in(folder / "out", names)) == pytest.approx(0.8, abs=0.01)
    if len(results) > 1 and not same_lengths:
        assert results[0]["lengths"] != results[1]["lengths"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    results = launch.run(folder, "single", 1, module="trl_worker", kind="plain")
    check(results, folder, "single")
    return results[0]


@pytest.mark.parametrize("engine", launch.ENGINES)
def test_uneven_rows_on_every_engine(engine, alone, tmp_path):
    """Together the ranks calibrate on the very sequences of one process, so they come to its masks."""
    results = launch.run(tmp_path, engine, 2, module="trl_worker", kind="plain")
    check(results, tmp_path, engine)
    assert sorted(results[0]["lengths"] + results[1]["lengths"]) == alone["lengths"]
    assert len(results[0]["lengths"]) != len(results[1]["lengths"])  # rows of one token are left out
    different = sum(a != b for n, f in alone["flags"].items() for a, b in zip(f, results[0]["flags"][n]))
    total = sum(map(len, alone["flags"].values()))
    print(f"{engine}: {different} of {total} connections differ")
    assert different <= 0.02 * total


def test_targets_outside_the_blocks(tmp_path):
    """A head's inputs are seen in whole passes, in which all ranks take part."""
    config = {"target_modules": ["down_proj", "lm_head"]}
    results = launch.run(tmp_path, "zero3", 2, module="trl_worker", kind="plain", config=config)
    assert results[0]["digest"] == results[1]["digest"] and results[0]["violations"] == 0
    assert any("lm_head" in name for name in results[0]["flags"])


@pytest.mark.parametrize("kind, engine", [
    ("sft", "ddp"), ("packed", "ddp"), ("dpo", "ddp"), ("distill", "ddp"), ("trl distill", "ddp"), ("grpo", "ddp"),
    ("sft", "zero2"), ("sft", "zero3"), ("packed", "zero3"), ("distill", "zero3"), ("grpo", "zero3"), ("sft", "fsdp2"),
    ("distill", "fsdp2"),
])
def test_trainers_as_they_come(kind, engine, tmp_path):
    if kind == "dpo":
        made.saved(tmp_path / "policy")
    check(launch.run(tmp_path, engine, 2, module="trl_worker", kind=kind), tmp_path, engine, kind == "packed")
