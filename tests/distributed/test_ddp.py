"""Two CPU processes under DDP: the ranks agree, and the statistics are those of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, processes: int, batch: int) -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "tests.distributed.worker", str(folder), str(batch)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_two_ranks_agree_and_match_one_process(tmp_path):
    first, second = start(tmp_path / "two", 2, 4)
    (alone,) = start(tmp_path / "one", 1, 8)
    assert first["engine"] == "DistributedDataParallel" and first["world"] == 2
    assert first["digest"] == second["digest"] and first["weights"] == second["weights"]
    assert first["violations"] == second["violations"] == alone["violations"] == 0
    assert first["sparsity"] == pytest.approx(0.8, abs=0.01)
    # The masks may differ from one process where calibration rows come in another order; the statistics agree.
    for name, value in alone["statistics"].items():
        assert first["statistics"][name] == second["statistics"][name]
        assert first["statistics"][name] == pytest.approx(value, rel=0.05), name
