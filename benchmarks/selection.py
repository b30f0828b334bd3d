"""Exact global selection: the k-th largest of many scores and the packed mask of the k largest.

    python -m benchmarks.selection --output selection.json

The task is the threshold plus one bit per score, ties to the lower position. Ours against torch.topk, torch.kthvalue,
torch.sort and numpy.partition, which all get our packing of the mask (numpy.packbits, on a CPU). Each method runs in a
process of its own that holds the scores; the extra memory is the highest resident memory above that, less the packed
mask. Then two ranks select from the same scores, and the bytes that each hands to its collectives are counted.
"""

import json
import os
import sys
import time

from benchmarks.common import PeakMemory, child, count_bytes, parser, report

METHODS = ("ours", "torch.topk", "torch.kthvalue", "torch.sort", "numpy.partition")


def scores_for(size: int, seed: int):
    import torch

    return torch.empty(size).normal_(generator=torch.Generator().manual_seed(seed)).abs_()


def select(method: str, scores, keep: int):
    """Packed mask of the `keep` largest scores; continuous scores, so that ties do not matter for the libraries."""
    import numpy
    import torch

    from mama_trl.masks.bits import pack_bits
    from mama_trl.selection.largest import packed_masks

    if method == "ours":
        return packed_masks([scores], keep)[0]
    if method == "torch.topk":
        edge = torch.topk(scores, keep, sorted=False).values.min()
    elif method == "torch.kthvalue":
        edge = torch.kthvalue(scores, scores.numel() - keep + 1).values
    elif method == "torch.sort":
        edge = torch.sort(scores, descending=True).values[keep - 1]
    else:
        edge = float(numpy.partition(scores.numpy(), scores.numel() - keep)[scores.numel() - keep])
    return pack_bits(scores >= edge)


def measure(task: dict) -> dict:
    import torch

    from mama_trl.masks.bits import count

    scores, keep = scores_for(task["size"], task["seed"]), task["size"] // 10
    select(task["method"], scores[:100_000], 10_000)  # imports and thread pools
    # Memory first, before the process holds on to what earlier runs freed; and apart from the timing, since its
    # sampling thread takes time from the work.
    with PeakMemory() as memory:
        packed = select(task["method"], scores, keep)
    extra = memory.extra - packed.numel()
    del packed
    best = float("inf")
    for _ in range(task["repeats"]):
        began = time.perf_counter()
        packed = select(task["method"], scores, keep)
        best = min(best, time.perf_counter() - began)
        kept = int(count(packed))
        del packed
    assert abs(kept - keep) <= (0 if task["method"] == "ours" else 100), kept
    return {"seconds": best, "extra_bytes_per_score": max(extra, 0) / task["size"], "kept": kept,
            "threads": torch.get_num_threads()}


def measure_wire(task: dict) -> dict:
    """Two ranks, half of the scores each: bytes handed to collectives for one global selection."""
    from torch import distributed as dist

    from mama_trl.engines import ranks
    from mama_trl.masks.bits import count
    from mama_trl.selection.largest import packed_masks

    dist.init_process_group("gloo")
    sent = count_bytes()
    own = scores_for(task["size"], task["seed"]).chunk(2)[dist.get_rank()]
    began = time.perf_counter()
    packed = packed_masks([own], task["size"] // 10, ranks.everyone())[0]
    seconds = time.perf_counter() - began
    result = {"seconds": seconds, "bytes": sum(sent)}
    total = ranks.total(count(packed), ranks.everyone())
    assert int(total) == task["size"] // 10
    dist.destroy_process_group()
    return result if int(os.environ["RANK"]) == 0 else {}


def main() -> None:
    args = parser(__doc__).parse_args()
    size, repeats = 100_000_000, 12 if args.quick else 20
    rows = []
    for method in METHODS:
        task = {"method": method, "size": size, "seed": args.seed, "repeats": 1 if method == "torch.sort" else repeats}
        rows.append({"method": method, **child("benchmarks.selection", task)})
    ours = rows[0]
    for row in rows:
        row["time_ratio"] = row["seconds"] / ours["seconds"]
    task = {"wire": True, "size": size // 10, "seed": args.seed}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    wire = child("benchmarks.selection", task, launcher, OMP_NUM_THREADS="1")
    summary = {
        "speedup_vs_best_library": min(row["seconds"] for row in rows[1:]) / ours["seconds"],
        "extra_bytes_per_score": ours["extra_bytes_per_score"],
        "wire_bytes": wire["bytes"],
    }
    report(rows, summary, args, scores=size, keep=size // 10, wire_scores=size // 10)


if __name__ == "__main__":
    if "--child" in sys.argv:
        work = json.loads(sys.argv[sys.argv.index("--child") + 1])
        outcome = measure_wire(work) if work.get("wire") else measure(work)
        if outcome:
            print(json.dumps(outcome))
    else:
        main()
