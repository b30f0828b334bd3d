"""What every benchmark shares: options, machine and versions, a table, a JSON file, and peak memory of a child."""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "transformers", "trl", "accelerate", "numpy")


def parser(description: str) -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--output", metavar="FILE.json", help="write rows, machine, versions, seeds and summary")
    options.add_argument("--quick", action="store_true", help="the same code on less, at most 3 minutes")
    options.add_argument("--seed", type=int, default=0)
    return options


def machine() -> dict:
    import torch

    found = {
        "system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def report(rows: list[dict], summary: dict, args, **facts) -> None:
    """Prints rows and summary; writes them with machine, versions and seed if asked to."""
    columns = list(rows[0])
    cells = [[f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)))
    print("\n".join(f"{name}: {value:.4g}" for name, value in summary.items()))
    if args.output:
        result = {
            "rows": rows, "summary": summary, "machine": machine(), "seed": args.seed, "quick": args.quick,
            "versions": {name: version(name) for name in PACKAGES}, **facts,
        }
        Path(args.output).write_text(json.dumps(result, indent=1))


def resident() -> int:
    """Bytes of this process in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def highest() -> int:
    """The most bytes that this process has had in memory; what it was forked from does not count."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


class PeakMemory:
    """Highest resident memory above that at the start while the block runs, sampled every millisecond."""

    def __enter__(self):
        self.start = self.peak = resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, resident())
            time.sleep(1e-3)

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()

    @property
    def extra(self) -> int:
        return max(0, self.peak - self.start)


def child(module: str, task: dict, launcher: list[str] | None = None, **environment: str) -> dict:
    """Runs `python -m MODULE --child TASK` in a process of its own, whose last line of output is JSON."""
    command = [sys.executable, *(launcher or []), "-m", module, "--child", json.dumps(task)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment},
        cwd=Path(__file__).resolve().parents[1],
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(lines[-1])


def count_bytes() -> list[int]:
    """Sizes of what this rank hands to all_reduce and all_gather."""
    from torch import distributed as dist

    sent: list[int] = []
    for name, position in (("all_reduce", 0), ("all_gather", 1)):
        original = getattr(dist, name)

        def counted(*args, original=original, position=position, **kwargs):
            sent.append(args[position].numel() * args[position].element_size())
            return original(*args, **kwargs)

        setattr(dist, name, counted)
    return sent
