"""Selects on scores that a file holds, cut into ranges over the ranks; leaves the whole masks. Started by launch.py."""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from benchmarks.common import count_bytes
from mama_trl import MamaError
from mama_trl.engines import ranks
from mama_trl.engines.shard import Shard
from mama_trl.masks import bits
from mama_trl.masks.maskset import MaskSet
from mama_trl.selection import bracket, largest
from mama_trl.selection.everywhere import global_packed_masks
from mama_trl.selection.largest import packed_masks
from mama_trl.selection.patterns import OwnedScores, nm_mask_of_owned, row_mask_of_owned


@dataclass(eq=False)
class Slice(Shard):
    """A range of a parameter, cut where the test wants it."""

    begin: int = 0
    size: int = 0

    start = property(lambda self: self.begin)
    length = property(lambda self: self.size)
    group = property(lambda self: ranks.everyone())
    master = property(lambda self: self.parameter.data.view(-1)[self.begin : self.begin + self.size])


def main(options: dict) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    folder = Path(options["folder"])
    if world > 1:
        dist.init_process_group("gloo")
    group = ranks.everyone()
    cases = torch.load(options["cases"])
    found = {}
    sent = count_bytes()
    for number, case in enumerate(cases):
        scores = case["scores"]
        if case.get("bracketed"):
            largest.SAMPLED_FROM, bracket._STRIDE = 1000, 3
        shards = []
        for index, whole in enumerate(scores):
            # Uneven cuts, some of them in the middle of rows, bytes and groups, some ranges empty.
            cuts = sorted((whole.numel() * (7 * i + index) // (7 * world) for i in range(1, world)))
            if number % 3 == 2 and world > 1:
                cuts[0] = 0
            bounds = [0, *cuts, whole.numel()]
            parameter = torch.nn.Parameter(whole)
            shards.append(Slice(f"p{index}", parameter, bounds[rank], bounds[rank + 1] - bounds[rank]))
        parts = [shard.master.clone() for shard in shards]
        sizes = [whole.numel() for whole in scores]
        made = {"all": packed_masks(parts, case["keep"], group)}
        first = parts[0].float()
        shape, transposed = tuple(scores[0].shape), case["transposed"]
        piece = OwnedScores(first, shards[0].start, shape, transposed)
        inputs = shape[0] if transposed else shape[1]
        made["row"] = [bits.pack_bits(row_mask_of_owned(piece, inputs // 3, group))]
        made["2:4"] = [bits.pack_bits(nm_mask_of_owned(piece, 2, 4, group))]
        floats = [part.float().abs() for part in parts]
        made["global"] = global_packed_masks(floats, sizes, 0.8, group=group)
        for way, packed in made.items():
            masks = MaskSet.from_shards({s.name: p for s, p in zip(shards, packed)}, shards[: len(packed)])
            found[f"{number} {way}"] = {n: masks.whole(n).int().flatten().tolist() for n in masks.names}
            masks.save(folder / f"{number} {way}")
    spoilt = parts[0].float()
    if rank == world - 1:
        spoilt[len(spoilt) // 2] = float("nan")  # on one rank: all of them must stop
    try:
        packed_masks([spoilt], len(cases[-1]["scores"][0]), group)
        found["NaN"] = "not seen"
    except MamaError:
        found["NaN"] = "refused"
    sent.clear()
    wide = torch.rand(200_000, generator=torch.Generator().manual_seed(rank))
    packed_masks([wide], 20_000 * world, group)
    with open(folder / f"rank{rank}.json", "w") as file:
        json.dump({"found": found, "bytes": sum(sent)}, file)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
