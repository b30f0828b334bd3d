"""Starts a test worker on an engine with CPU processes; the recipes that make each engine real without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from mama_trl.scripts.launch import accelerate_file

ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def deepspeed_config(engine: str) -> dict:
    """The bundled DeepSpeed config, with what a CPU needs: no overlapping streams, torch's AdamW."""
    config = json.loads((accelerate_file("ddp").parent / f"{engine}.json").read_text())
    config["zero_optimization"]["overlap_comm"] = False
    if engine.startswith("zero3"):
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    if "offload" not in engine:
        config["zero_force_ds_cpu_optimizer"] = False
    config["zero_optimization"].update(json.loads(os.environ.get("MAMA_TEST_ZERO", "{}")))
    config["bf16"] = {"enabled": "auto"}
    return config


def launcher(folder: Path, engine: str, processes: int) -> tuple[list[str], dict]:
    """The command up to the worker's module, and its environment."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false",
        "MAMA_TEST_ENGINE": engine, "DS_ACCELERATOR": "cpu",
    }
    environment.pop("ACCELERATE_USE_CPU", None)
    if engine == "single":
        return [sys.executable, "-m"], environment
    if engine in ("ddp", "gloo"):
        options = ["--standalone", f"--nproc_per_node={processes}"]
        return [sys.executable, "-m", "torch.distributed.run", *options, "-m"], environment
    settings = yaml.safe_load(accelerate_file(engine).read_text())
    settings.update(num_processes=processes, mixed_precision="no", use_cpu=False)
    if engine == "fsdp2":
        environment["ACCELERATE_TORCH_DEVICE"] = "cpu"
    else:
        (folder / "deepspeed.json").write_text(json.dumps(deepspeed_config(engine)))
        settings["deepspeed_config"] = {
            "deepspeed_config_file": str(folder / "deepspeed.json"),
            "zero3_init_flag": settings["deepspeed_config"]["zero3_init_flag"],
        }
        settings.pop("mixed_precision")
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(settings))
    port = 20000 + (os.getpid() * 7 + hash(str(folder))) % 20000
    options = ["--config_file", str(folder / "accelerate.yaml"), "--main_process_port", str(port), "--module"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options], environment


def start(folder: Path, engine: str, processes: int, module: str = "train_worker", **options) -> subprocess.Popen:
    """Starts `tests.distributed.MODULE`, which gets `options` as JSON and leaves `rankR.json` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("rank*.json"):
        old.unlink()
    command, environment = launcher(folder, engine, processes)
    command += [f"tests.distributed.{module}", json.dumps({"folder": str(folder), **options})]
    log = open(folder / "log.txt", "w")
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def results(folder: Path, processes: int) -> list[dict]:
    """What each rank left; judged by outputs, since DeepSpeed can abort at exit after it has finished."""
    paths = [folder / f"rank{rank}.json" for rank in range(processes)]
    if not all(path.exists() for path in paths):
        raise AssertionError((folder / "log.txt").read_text()[-6000:])
    return [json.loads(path.read_text()) for path in paths]


def run(folder: Path, engine: str, processes: int, timeout: int = 500, **options) -> list[dict]:
    process = start(folder, engine, processes, **options)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError("timed out: " + (folder / "log.txt").read_text()[-6000:]) from None
    return results(folder, processes)
