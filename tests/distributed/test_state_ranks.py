"""Saving elsewhere, finished runs, zeros without masks and NaN, where ranks share the parameters."""

import shutil

import pytest

from mama_trl.masks.maskset import MaskSet
from mama_trl.training.checkpoints import fault
from tests.distributed import launch
from tests.training import saved

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
ENGINES = ("ddp", "zero2", "zero3", "fsdp2")


@pytest.fixture(scope="module", params=ENGINES)
def trained(request, tmp_path_factory):
    """(engine, folder, results) of four steps with a mask at the second, saved elsewhere than in the output folder."""
    folder = tmp_path_factory.mktemp(request.param)
    results = launch.run(folder, request.param, 2, module="state_worker", phase="train", save="elsewhere")
    return request.param, folder, results


def test_masks_are_saved_elsewhere_whole(trained):
    engine, folder, results = trained
    for result in results:
        assert result["engine"] == engine and result["violations"] == 0
        assert result["sparsity"] == pytest.approx(saved.sparsity(folder / "elsewhere"), abs=1e-9)
    masks = MaskSet.load(folder / "elsewhere")
    assert [path.name for path in (folder / "elsewhere" / "mama").iterdir()] == ["masks.safetensors"]
    assert masks.digest() == results[0]["digest"] and masks.sparsity() == pytest.approx(results[0]["sparsity"])
    assert all(fault(folder / "run" / f"checkpoint-{step}") is None for step in (2, 4))


def test_a_finished_run_is_left_as_it_is(trained):
    engine, folder, results = trained
    again = launch.run(
        folder, engine, 2, module="state_worker", phase="train", save="again",
        resume=str(folder / "run" / "checkpoint-4"),
    )
    assert saved.same(folder / "again", folder / "elsewhere")
    assert [result["step"] for result in again] == [4, 4] and again[0]["digest"] == results[0]["digest"]
    assert any("the run is finished" in line for line in again[0]["said"])


def test_a_damaged_checkpoint_is_refused_on_every_rank(trained):
    engine, folder, _ = trained
    damaged = folder / "run" / "checkpoint-2"
    shutil.copytree(damaged, folder / "keep")
    for path in (damaged / "mama").glob("masks*"):
        path.write_bytes(path.read_bytes()[:-3])
    results = launch.run(folder, engine, 2, module="state_worker", phase="train", save="never", resume=str(damaged))
    for result in results:
        assert "checkpoint-2 is not whole" in result["error"] and "resume from checkpoint-4" in result["error"]
    shutil.rmtree(damaged)
    shutil.move(folder / "keep", damaged)


def test_pruning_a_choice_of_matrices_leaves_the_others_masks(trained):
    engine, folder, _ = trained
    results = launch.run(
        folder, engine, 2, module="state_worker", phase="choice", save="more", model=str(folder / "elsewhere")
    )
    names = [name for name in saved.raw_tensors(folder / "more") if name.endswith("proj.weight")]
    mlp, attention = ({name for name in names if (".mlp." in name) is own} for own in (True, False))
    assert saved.zeros(folder / "more", mlp) == saved.zeros(folder / "elsewhere", mlp)
    assert saved.sparsity(folder / "more", attention) == pytest.approx(0.85, abs=1e-2)
    assert [result["violations"] for result in results] == [0, 0] and results[0]["digest"] == results[1]["digest"]
    assert MaskSet.load(folder / "more").digest() == results[0]["digest"]


@pytest.mark.parametrize("masks", [True, False])
def test_what_was_saved_is_held(trained, masks):
    engine, folder, _ = trained
    if not masks:
        shutil.rmtree(folder / "elsewhere" / "mama")
    results = launch.run(
        folder, engine, 2, module="state_worker", phase="hold", save="next", model=str(folder / "elsewhere")
    )
    before = saved.sparsity(folder / "elsewhere")
    assert saved.sparsity(folder / "next") == pytest.approx(before, abs=1e-9)
    assert results[0]["sparsity"] == pytest.approx(before, abs=1e-9)
    assert results[0]["digest"] == results[1]["digest"]
    assert any("these are held" in line for line in results[0]["said"]) is not masks


def test_one_ranks_nan_stops_all(trained):
    engine, folder, _ = trained
    shutil.rmtree(folder / "run")
    results = launch.run(folder, engine, 2, module="state_worker", phase="nan", save="never")
    for result in results:
        assert "holds NaN or infinity after step" in result["error"] and "checkpoint-2" in result["error"]
    assert len({result["error"] for result in results}) == 1
    assert not (folder / "never").exists()
