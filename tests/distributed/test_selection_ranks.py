"""1, 2 and 4 ranks choose bit-identical masks for identical scores, and read each other's files."""

import pytest
import torch

from mama_trl.masks.maskset import MaskSet
from tests.distributed import launch


@pytest.mark.slow
def test_one_two_and_four_ranks_give_identical_masks(tmp_path):
    generator = torch.Generator().manual_seed(0)
    cases = []
    for number in range(6):
        scores = [torch.randn(shape, generator=generator) for shape in ((12, 20), (8, 8), (3, 4))]
        if number % 2:
            scores = [s.round(decimals=0) for s in scores]  # many ties, zeros of both signs
        if number == 4:
            scores = [torch.ones_like(s) for s in scores]
        if number == 5:
            scores = [s.bfloat16() for s in scores]
        total = sum(s.numel() for s in scores)
        cases.append({"scores": scores, "keep": [100, 1, 0, total, 77, 200][number], "transposed": number in (1, 2)})
    large = [torch.randn(shape, generator=generator) for shape in ((700, 200), (8, 8))]
    cases.append({"scores": large, "keep": 40_000, "transposed": False, "bracketed": True})
    torch.save(cases, tmp_path / "cases.pt")
    answers = {}
    for world, engine in ((1, "single"), (2, "gloo"), (4, "gloo")):
        options = {"module": "select_worker", "cases": str(tmp_path / "cases.pt")}
        parts = launch.run(tmp_path / str(world), engine, world, **options)
        assert all(part["found"] == parts[0]["found"] for part in parts)
        assert all(part["bytes"] <= 1.1 * 2**20 for part in parts)
        answers[world] = parts[0]["found"]
    assert answers[1] == answers[2] == answers[4]
    assert answers[1].pop("NaN") == "refused"
    for number, case in enumerate(cases):
        flat = torch.cat([s.float().flatten() + 0.0 for s in case["scores"]])
        expected = torch.zeros(len(flat), dtype=torch.int)
        expected[flat.argsort(descending=True, stable=True)[: case["keep"]]] = 1
        got = answers[1][f"{number} all"]
        assert sum(got.values(), []) == expected.tolist()
        # What four ranks wrote, one reads.
        for way in ("all", "global", "row", "2:4"):
            whole = MaskSet.load(tmp_path / "4" / f"{number} {way}")
            assert {n: whole.mask(n).int().flatten().tolist() for n in whole.names} == answers[1][f"{number} {way}"]
