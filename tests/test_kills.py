"""Twenty kills each of a training, of `mama prune` and of `mama run`, at random moments and aimed at saves and ends.

After each kill the same command is called again, until it comes to its end, and what it leaves must be bit for bit what
an uninterrupted command leaves.
"""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.scripts.conftest import TEXT
from tests.tiny_tokenizer import tiny_tokenizer
from tests.training import saved

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
ROOT = Path(__file__).resolve().parents[1]
KILLS = 20
EVERY = bool(os.environ.get("MAMA_KILL_EVERYWHERE"))  # before every single write: half an hour
SIGKILLED = -9


class Zygote:
    """Starts commands, one after the other; see kill_zygote.py."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.kill_zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env=environment, stderr=open(folder / "zygote.txt", "w"),
        )

    def run(self, argv, **request) -> dict:
        self.number += 1
        log = str(self.folder / f"log{self.number}.txt")
        print(json.dumps({"argv": [str(word) for word in argv], "log": log, **request}), file=self.process.stdin,
              flush=True)
        line = self.process.stdout.readline()
        assert line, (self.folder / "zygote.txt").read_text()[-3000:]
        return {**json.loads(line), "log": Path(log).read_text()}

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory):
    started = Zygote(tmp_path_factory.mktemp("logs"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
             "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
             "attention_dropout": 0.1}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "train.txt").write_text(TEXT)
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    values.pop("output_dir", None)
    values["data"].update(
        sequence_length=32, vocab_size=320, characters=60000, calibration_blocks=8, evaluation_blocks=8
    )
    values["model"].update(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                           num_key_value_heads=2)
    for stage in ("pretrain", "sft", "grpo", "distill"):
        values[stage]["max_steps"] = 4
    values["grpo"].update(per_device_train_batch_size=16, mask_start=3, learning_rate=1e-3)
    (root / "recipe.yaml").write_text(yaml.safe_dump(values))
    return root


def moments(kind: str, events: int, seconds: float, every: bool) -> list[dict]:
    """When to kill: eight times at random, nine before or in the middle of what is written (or `every` time that
    something is written), thrice at the very end."""
    draw = random.Random(kind)
    some = range(1, events - 2) if every else sorted(draw.sample(range(1, events - 2), 9))
    aimed = [*some, events - 2, events - 1, events]
    return [{"after": draw.uniform(0.05, 0.98) * seconds} for _ in range(KILLS - 12)] + [{"at": at} for at in aimed]


def killed_and_called_again(zygote, output, argv, again, reference, kind, every=False, done=False) -> None:
    """Kills `argv` at every moment, and every second time the next call too, and calls `again` until it is done; then
    compares with the `reference` run. `done` says that a command which has come to its end refuses to be called again.
    """
    kills, draw = 0, random.Random(kind)
    for moment in moments(kind, reference["events"], reference["seconds"], every):
        shutil.rmtree(output, ignore_errors=True)
        watched = {"folder": str(output)} if "at" in moment else {}
        first = zygote.run(argv, **moment, **watched)
        while first["status"] == 0 and "after" in moment:  # the moment came too late
            moment["after"] *= 0.7
            shutil.rmtree(output)
            first = zygote.run(argv, **moment)
        assert first["status"] == SIGKILLED, f"{moment}\n{first['log'][-3000:]}"
        kills += 1
        last = {"status": SIGKILLED}
        if kills % 2:
            last = zygote.run(again, after=draw.uniform(0.1, 0.9) * reference["seconds"])
        if last["status"] == SIGKILLED:
            last = zygote.run(again)
        # Killed when all was done but giving the folder free: a command without --overwrite then finds its own work.
        over = done and last["status"] == 2 and "already holds something" in last["log"] and not reference["compare"]()
        assert last["status"] == 0 or over, f"{moment}\n{last['log'][-3000:]}"
        assert "Traceback" not in last["log"], last["log"][-3000:]
        differs = reference["compare"]()
        assert not differs, f"{moment}: {differs}\n{first['log'][-1000:]}"
    print(f"{kind}: {kills} kills, {reference['events']} events and {reference['seconds']:.1f} s in a whole run")


def contents(path: Path):
    """The bytes of a file; of tensors the parsed header, whose entries lie in any order, and the bytes behind it."""
    data = path.read_bytes()
    if path.suffix != ".safetensors":
        return data
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def same_files(one: Path, other: Path, names) -> list[str]:
    """The names of files that differ."""
    return [name for name in names if contents(one / name) != contents(other / name)]


def reference_run(zygote, output, whole, argv, compare) -> dict:
    """An uninterrupted command, with its events counted, and a second one, which shows that two are equal at all."""
    first = zygote.run(argv, folder=str(output))
    assert first["status"] == 0, first["log"][-3000:]
    shutil.move(output, whole)
    second = zygote.run(argv)
    assert second["status"] == 0 and not compare(), "two uninterrupted commands differ"
    return {"events": first["events"], "seconds": second["seconds"], "compare": compare}


def test_training(zygote, folder, tmp_path):
    output, whole = tmp_path / "run", tmp_path / "whole"
    flags = {
        "model_name_or_path": folder / "model", "dataset_name": folder / "train.txt", "output_dir": output,
        "max_steps": 8, "save_steps": 2, "save_total_limit": 2, "max_length": 32, "use_cpu": "true", "sparsity": 0.6,
        "mask_schedule": "cubic", "mask_start": 2, "mask_end": 6, "mask_interval": 2, "logging_steps": 1,
        "per_device_train_batch_size": 4, "calibration_tokens": 256, "learning_rate": 1e-3,
    }
    argv = ["sft", *(word for name, value in flags.items() for word in (f"--{name}", value))]
    files = ["model.safetensors", "mama/masks.safetensors", "mama/statistics.safetensors"]
    reference = reference_run(zygote, output, whole, argv, lambda: same_files(output, whole, files))
    again = [*argv, "--resume_from_checkpoint", "true"]
    killed_and_called_again(zygote, output, argv, again, reference, "training", EVERY)
    assert saved.sparsity(output) == pytest.approx(0.6, abs=0.01)


def test_prune(zygote, folder, tmp_path):
    output, whole = tmp_path / "pruned", tmp_path / "whole"
    argv = ["prune", folder / "model", "--calibration", folder / "train.txt", "--output", output, "--sparsity", "0.7",
            "--calibration_tokens", "2048"]
    files = ["model.safetensors", "mama/masks.safetensors", "config.json", "tokenizer.json"]

    def compare():
        left = [".progress"] if (output / ".progress").exists() else []
        return same_files(output, whole, files) + left

    reference = reference_run(zygote, output, whole, argv, compare)
    killed_and_called_again(zygote, output, argv, argv, reference, "prune", every=True, done=True)


def test_run(zygote, folder, tmp_path):
    output, whole = tmp_path / "run", tmp_path / "whole"
    argv = ["run", folder / "recipe.yaml", "--output_dir", output]
    files = [f"{stage}/{name}" for stage in ("pretrain", "sft", "grpo", "model")
             for name in ("model.safetensors", "mama/statistics.safetensors")]
    files += ["grpo/mama/masks.safetensors", "model/mama/masks.safetensors", "model/packed/model.safetensors"]

    def timeless(report):
        """A report without what it took in seconds."""
        if isinstance(report, dict):
            return {name: timeless(value) for name, value in report.items() if name != "seconds"}
        return [timeless(value) for value in report] if isinstance(report, list) else report

    def compare():
        reports = [timeless(json.loads((place / "report.json").read_text())) for place in (output, whole)]
        return same_files(output, whole, files) + ([] if reports[0] == reports[1] else ["report.json"])

    reference = reference_run(zygote, output, whole, argv, compare)
    killed_and_called_again(zygote, output, argv, argv, reference, "run", EVERY)
