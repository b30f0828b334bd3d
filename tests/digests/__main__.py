"""Digests of masks, weights and statistics for about 270 cases, to show that moving code changes nothing.

    python -m tests.digests --write FILE.json       before: computes all cases and writes their digests
    python -m tests.digests --compare FILE.json     after: computes them again; exits 1 on any difference
    python -m tests.digests --compare FILE.json --only 'train .*cubic'

`before.json` is what the code gave when it was last written, after a change of results that was wanted. The cases are
in cases.py, on tiny random models; all they call of the package is in adapter.py, the one file to adapt when a module
or a signature moves.

A digest is the SHA-256 over a tensor's type, shape and bytes; the tensors of one kind in a decoder block are taken as
one. Beside it lie the norm and four sums of the elements with random signs, from which the distance of two tensors is
estimated without either being kept (Alon, Matias and Szegedy): so a difference is told as a number of mask bits or a
relative distance, right within a factor of two or so.

Digests are those of one kind of processor, one thread and one version of torch; elsewhere the last bits of a sum may
differ, and a nearly tied connection with them. The file says what it was written with. It is no test: pytest does not
collect it.
"""

import os

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import argparse
import contextlib
import hashlib
import io
import json
import logging
import math
import platform
import re
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from torch import Tensor

from .changed import CHANGED

SIGNS = 4
Entry = list  # [SHA-256, type and shape, norm, signed sums ...]


def entry(tensor: Tensor) -> Entry:
    """Digest, type and shape, norm and signed sums of one tensor."""
    tensor = tensor.contiguous()
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {'x'.join(map(str, tensor.shape))}"
    raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    flat = tensor.reshape(-1).double()
    sums = []
    for seed in range(SIGNS):
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, flat.shape, generator=generator, dtype=torch.int8)
        sums.append(float(flat @ (2 * signs.double() - 1)))
    summary = [float(f"{value:.7g}") for value in (float(flat.norm()), *sums)]
    return [hashlib.sha256(kind.encode() + raw).hexdigest(), kind, *summary]


def by_block(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors `KIND NAME` of one decoder block as one, `KIND of block 0`; others as they are."""
    groups: dict[str, list[Tensor]] = {}
    for key, tensor in sorted(tensors.items()):
        kind, _, name = key.rpartition(" ")
        number = re.search(r"\.(\d+)\.", name)
        groups.setdefault(f"{kind} of block {number[1]}" if number else key, []).append(tensor.detach())
    return {
        key: torch.cat([tensor.reshape(-1) for tensor in parts]) if " of block " in key else parts[0]
        for key, parts in groups.items()
    }


def compute(name: str) -> dict[str, Entry]:
    """The entries of one case; of a refused one its sentence."""
    from transformers import set_seed

    from mama_trl import MamaError

    from .cases import CASES

    set_seed(0)
    said = io.StringIO()  # the Trainer's numbers and progress bars
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            tensors = by_block(CASES[name]())
    except MamaError as error:
        tensors = {"refused": torch.tensor(list(str(error).encode()), dtype=torch.uint8)}
    except Exception:
        print(said.getvalue())
        raise
    return {key: entry(tensor) for key, tensor in tensors.items()}


def difference(before: Entry, now: Entry) -> str:
    """How far two tensors are from each other, in words."""
    if before[1] != now[1]:
        return f"{now[1]}, was {before[1]}"
    distance = math.sqrt(sum((a - b) ** 2 for a, b in zip(before[3:], now[3:])) / SIGNS)
    if before[1].startswith("bool"):
        total = math.prod(int(size) for size in before[1].partition(" ")[2].split("x") if size)
        return f"about {max(round(distance**2), 1)} of {total} bits"
    return f"relative distance about {distance / max(before[2], 1e-30):.1g}" if distance else "last digits only"


def compare(before: dict[str, Entry], now: dict[str, Entry]) -> list[str]:
    """One line for every tensor that differs."""
    lines = [f"{name}: {'missing now' if name in before else 'new'}" for name in sorted(before.keys() ^ now.keys())]
    common = sorted(before.keys() & now.keys())
    return lines + [f"{n}: {difference(before[n], now[n])}" for n in common if before[n][0] != now[n][0]]


def versions() -> dict[str, str]:
    """What the digests depend on beside the code."""
    import transformers
    import trl

    return {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "trl": trl.__version__, "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def dump(cases: dict[str, dict[str, Entry]]) -> str:
    """JSON with one line a tensor, sorted."""
    blocks = []
    for case, entries in sorted(cases.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in sorted(entries.items()))
        blocks.append(f" {json.dumps(case)}: {{\n{lines}\n }}")
    return f'{{\n"versions": {json.dumps(versions(), sort_keys=True)},\n"cases": {{\n' + ",\n".join(blocks) + "\n}\n}\n"


def write(path: Path, names: list[str]) -> int:
    """Computes `names` and writes them; stops at the first error."""
    found = {}
    for name in names:
        started = time.perf_counter()
        found[name] = compute(name)
        print(f"{time.perf_counter() - started:5.2f} s  {name}", flush=True)
    path.write_text(dump(found))
    print(f"{len(found)} cases, {sum(map(len, found.values()))} tensors: {path}")
    return 0


def check(path: Path, names: list[str], only: re.Pattern) -> int:
    """Computes `names`, prints how each stands to the file; 1 if one is neither equal nor listed as changed, else 0."""
    stored = json.loads(path.read_text())
    for name, value in versions().items():
        if stored["versions"].get(name) != value:
            print(f"note: {name} is {value}, the file was written with {stored['versions'].get(name)}")
    before = stored["cases"]
    equal, changed, wrong = 0, 0, [name for name in sorted(before) if only.search(name) and name not in names]
    for name in wrong:
        print(f"missing  {name}: in the file, and no case now")
    for name in names:
        try:
            lines = compare(before[name], compute(name)) if name in before else ["missing in the file"]
        except Exception:
            lines = ["raised", *traceback.format_exc().splitlines()]
        if lines and name in CHANGED:
            print(f"changed  {name}: {CHANGED[name]}", flush=True)
            changed += 1
            continue
        print(f"{'differs' if lines else 'equal  '}  {name}", *lines, sep="\n         ", flush=True)
        equal += not lines
        wrong += [name] if lines else []
    print(f"{equal} cases are equal, {changed} changed as changed.py lists, {len(wrong)} are not equal")
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.digests", description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE", help="compute and write")
    action.add_argument("--compare", type=Path, metavar="FILE", help="compute and compare; exits 1 on any difference")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX", help="cases to compute")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from .cases import CASES

    names = [name for name in sorted(CASES) if args.only.search(name)]
    return write(args.write, names) if args.write else check(args.compare, names, args.only)


if __name__ == "__main__":
    sys.exit(main())
