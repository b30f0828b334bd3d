"""Damaged files: every kind that is written or read is one sentence, done again, or as it was; never silently other."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mama_trl.cli import main
from mama_trl.demo import pipeline
from mama_trl.demo.stage_file import FACTS, read_stage, write_stage
from mama_trl.engines.detect import shards_of
from mama_trl.errors import MamaError
from mama_trl.export.packed import load_packed, save_packed
from mama_trl.indicators.trajectory import Trajectory
from mama_trl.masks.maskset import MaskSet
from mama_trl.masks.tensors import TensorFile, read_tensors, write_tensors
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import prune
from mama_trl.pruning.resume import COMMAND, FOLDER, Unfinished
from mama_trl.report.check import check_report
from mama_trl.training.inputs import _read as read_inputs

from .faults import ROOT, command_line, furnish, refusal, refused, tiny_model, tree, unchanged


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """`model`, pruned and with its masks; `dense`, as it was before."""
    root = tmp_path_factory.mktemp("damage")
    model = AutoModelForCausalLM.from_pretrained(tiny_model(root / "dense"))
    tiny_model(root / "model")
    masks = prune(model, method="magnitude", sparsity=0.5, progress=False)
    model.save_pretrained(root / "model")
    masks.save(root / "model")
    return root


@pytest.fixture
def model(root):
    return AutoModelForCausalLM.from_pretrained(root / "model")


# ---------------------------------------------------------------------- files of tensors


def kinds(root: Path, model, folder: Path) -> dict:
    """(file, reader) of each kind, freshly written into `folder`."""
    masks = MaskSet.load(root / "model", model)
    masks.save(folder)
    trajectory = Trajectory(shards_of((t.name, t.parameter) for t in find_targets(model)), ["sensitivity"])
    trajectory.save(folder)
    save_packed(model, masks, folder / "packed.safetensors")
    tokens = {"tokens": torch.arange(50), "length": torch.tensor(10)}
    write_tensors(folder / "inputs.safetensors", tokens, {"format": "mama-inputs-2"})
    write_tensors(folder / "rows.safetensors", {"text": torch.arange(48).view(6, 8)}, {"format": "mama-rows-1"})
    return {
        "masks": (folder / "mama" / "masks.safetensors", lambda: MaskSet.load(folder, model)),
        "statistics": (folder / "mama" / "statistics.safetensors", lambda: trajectory.load(folder, True)),
        "packed": (folder / "packed.safetensors", lambda: load_packed(folder / "packed.safetensors")),
        "inputs": (folder / "inputs.safetensors", lambda: read_inputs(folder / "inputs.safetensors")),
        "rows": (folder / "rows.safetensors", lambda: read_tensors(folder / "rows.safetensors", "data file", "again")),
    }


@pytest.mark.parametrize("kind", ["masks", "statistics", "packed", "inputs", "rows"])
def test_one_flipped_bit_anywhere_is_noticed(root, model, tmp_path, kind):
    path, read = kinds(root, model, tmp_path)[kind]
    data = path.read_bytes()
    read()
    for at in range(0, len(data), max(1, len(data) // 150)):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        try:
            read()
        except MamaError as error:
            assert str(path) in str(error) and len(str(error)) < 300
        else:  # white space of the header, which says the same
            assert chr(data[at]) in " \n\t" or _same_header(path, data), at


def _same_header(path: Path, data: bytes) -> bool:
    size = int.from_bytes(data[:8], "little")
    now = path.read_bytes()
    try:
        return json.loads(now[8 : 8 + size]) == json.loads(data[8 : 8 + size]) and now[8 + size :] == data[8 + size :]
    except ValueError:
        return False


@pytest.mark.parametrize("kind", ["masks", "statistics", "packed", "inputs", "rows"])
@pytest.mark.parametrize("damage", ["empty", "cut", "zeros", "text", "another kind", "folder", "more"])
def test_other_damage_is_one_sentence(root, model, tmp_path, kind, damage):
    files = kinds(root, model, tmp_path)
    path, read = files[kind]
    data = path.read_bytes()
    if damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes({
            "empty": b"", "cut": data[: len(data) // 2], "zeros": bytes(len(data)), "text": b"hello" * 50,
            "another kind": files["rows" if kind != "rows" else "masks"][0].read_bytes(), "more": data + b"x",
        }[damage])
    if (kind, damage) == ("rows", "another kind"):
        read()  # any tensors are rows
    else:
        with refusal("safetensors"):
            read()


def test_counts_that_contradict_the_bits_are_refused(root, model, tmp_path):
    """Also where the checksums are those of the contradiction."""
    masks = MaskSet.load(root / "model", model)
    name = masks.names[0]
    masks.kept[name] += 1
    masks.save(tmp_path)
    for given in (None, model):
        with refusal(f"keeps .* connections of {name}"):
            MaskSet.load(tmp_path, given)


@pytest.mark.parametrize("change", [
    {"shapes": {}}, {"shapes": 5}, {"kept": None}, {"kept": {}}, {"pattern": "some"}, {"pattern": 5}, {"ranges": {}},
    {"ranges": {"a": [0]}}, {"ranges": 5},
])
def test_headers_that_make_no_sense_are_refused(root, model, tmp_path, change):
    masks = MaskSet.load(root / "model", model)
    header = {
        "format": "mama-masks-3", "shapes": masks.shapes, "pattern": "unstructured", "kept": masks.kept,
        "ranges": masks.ranges, **change,
    }
    write_tensors(tmp_path / "mama" / "masks.safetensors", masks.bits, header)
    with refusal("."):
        MaskSet.load(tmp_path, model)


def test_a_twins_masks_are_noticed(root, tmp_path):
    """Same shapes, other weights: what its masks prune is not zero there."""
    twin = AutoModelForCausalLM.from_pretrained(tiny_model(tmp_path / "twin", seed=5))
    with refusal("belong to another model"):
        MaskSet.load(root / "model", twin)
    pruned = prune(twin, method="magnitude", sparsity=0.5, progress=False)
    twin.save_pretrained(tmp_path / "twin")
    pruned.save(tmp_path / "twin")
    assert MaskSet.load(tmp_path / "twin", twin).digest() == pruned.digest()
    with refusal("belong to another model"):
        MaskSet.load(root / "model", twin)


def without_checksums(path: Path, form: str) -> None:
    """The file as an earlier version wrote it."""
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if not key.startswith("checksum")}
    save_file(load_file(path), path, metadata={**metadata, "format": form})


def test_files_of_an_earlier_version_are_read_and_that_is_said_once(root, model, tmp_path, caplog):
    files = kinds(root, model, tmp_path)
    right = MaskSet.load(tmp_path, model).digest(), load_packed(files["packed"][0])
    without_checksums(files["masks"][0], json.dumps("mama-masks-2"))
    without_checksums(files["statistics"][0], json.dumps("mama-statistics-2"))
    without_checksums(files["packed"][0], "mama-packed-1")
    save_file(load_file(files["inputs"][0]), files["inputs"][0])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert MaskSet.load(tmp_path, model).digest() == right[0]
            got = load_packed(files["packed"][0])
            files["statistics"][1](), files["inputs"][1]()
    assert all(torch.equal(got[name], right[1][name]) for name in got)
    assert sum("earlier version" in record.getMessage() for record in caplog.records) == 4
    without_checksums(files["rows"][0], json.dumps("mama-rows-1"))  # never was without
    with refusal("header"):
        files["rows"][1]()


def test_old_masks_without_checksums_are_still_counted(root, model, tmp_path):
    path = kinds(root, model, tmp_path)["masks"][0]
    tensors = load_file(path)
    first = next(iter(tensors))
    tensors[first][0] ^= 1
    with safe_open(path, "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if not key.startswith("checksum")}
    save_file(tensors, path, metadata={**metadata, "format": json.dumps("mama-masks-2")})
    with refusal("keeps"):
        MaskSet.load(tmp_path, model)


@pytest.mark.parametrize("change", [
    lambda t: t.pop("mask/model.layers.0.mlp.up_proj.weight"),
    lambda t: t.update({"values/model.layers.0.mlp.up_proj.weight": torch.zeros(3)}),
    lambda t: t.update({"mask/model.layers.0.mlp.up_proj.weight": torch.zeros(2, dtype=torch.uint8)}),
    lambda t: t.update({"other/x": torch.zeros(3)}),
])
def test_packed_files_that_contradict_themselves(root, model, tmp_path, change):
    path = kinds(root, model, tmp_path)["packed"][0]
    file = TensorFile(path, "packed file", "again")
    tensors = {name: file.read(name) for name in file.names}
    change(tensors)
    write_tensors(path, tensors, file.header)
    with refusal("packed"):
        load_packed(path)


# ---------------------------------------------------------------------- leftovers of a killed run


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """A place where `mama prune` was killed after its first block; returns (place, argv)."""
    place = furnish(tmp_path)
    argv = command_line(place, "prune")
    store = Unfinished.store

    def once(self, *args):
        store(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Unfinished, "store", once)
        assert main(argv) == 130
    assert (place / "out" / FOLDER / COMMAND).is_file()
    return place, argv


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "another block", "old"])
def test_a_damaged_block_is_done_again(killed, caplog, damage):
    place, argv = killed
    block = next((place / "out" / FOLDER).glob("block-*.safetensors"))
    data = block.read_bytes()
    if damage == "another block":
        write_tensors(block, {"weight x": torch.zeros(3)}, {"format": "mama-progress-2"})
    elif damage == "old":
        save_file(load_file(block), block)
    else:
        at = len(data) - 20
        flipped = data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]
        block.write_bytes({"cut": data[:100], "flip": flipped, "empty": b""}[damage])
    with caplog.at_level(logging.WARNING):
        assert main(argv) == 0
    assert ("done again" in caplog.text) == (damage != "old")
    assert not (place / "out" / FOLDER).exists()
    assert main([*argv[:-1], str(place / "whole")]) == 0
    one, other = (load_file(place / name / "model.safetensors") for name in ("out", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"seed": 0', "[" * 9999, None])
def test_a_damaged_command_file_means_to_begin_anew(killed, capsys, text):
    place, argv = killed
    path = place / "out" / FOLDER / COMMAND
    path.unlink()
    if text is not None:
        path.write_text(text)
        assert main(argv) == 0 and not (place / "out" / FOLDER).exists()
    else:  # blocks alone say nothing of what they are, and the folder is not empty
        assert "already holds something" in refused(capsys, *argv)
        assert main([*argv, "--overwrite"]) == 0


def test_what_is_not_ours_in_the_folder_of_progress_stays(killed):
    place, argv = killed
    (place / "out" / FOLDER / "mine.txt").write_text("x")
    assert main(argv) == 0
    assert sorted(tree(place / "out" / FOLDER)) == ["mine.txt"]


def facts_of(stage: str) -> dict:
    return {"name": stage, "seconds": 1.0, "steps": 1, "tokens": 1, **{name: 1 for name in FACTS[stage]}}


@pytest.mark.parametrize("damage", [
    "{", "", "null", "[]", "5", '{"name": "sft"}', "[" * 9999, "fact", "checksum", "file", "size", "gone",
])
def test_a_damaged_stage_is_done_again(tmp_path, caplog, damage):
    (tmp_path / "model.safetensors").write_bytes(bytes(range(100)))
    facts = write_stage(tmp_path, facts_of("sft"))
    assert read_stage(tmp_path, "sft") == facts
    path = tmp_path / "stage.json"
    if damage == "fact":
        path.write_text(path.read_text().replace('"accuracy": 1', '"accuracy": 0'))
    elif damage == "checksum":
        path.write_text(path.read_text().replace("checksum", "checksun"))
    elif damage == "file":
        (tmp_path / "model.safetensors").write_bytes(bytes(range(99)) + b"x")
    elif damage == "size":
        (tmp_path / "model.safetensors").write_bytes(b"")
    elif damage == "gone":
        (tmp_path / "model.safetensors").unlink()
    else:
        path.write_text(damage)
    assert read_stage(tmp_path, "sft") is None
    assert "is done again" in caplog.text
    assert read_stage(tmp_path, "grpo") is None


def test_a_run_does_again_what_is_damaged_and_what_rests_on_it(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((ROOT / "configs" / "demo.yaml").read_text())
    done: list[str] = []

    def work(stage: str):
        def inner(run, label):
            done.append(stage)
            (run.path(stage) / "model.safetensors").write_text(stage)
            return facts_of(stage)

        return inner

    stages = list(FACTS)
    for stage in stages:
        monkeypatch.setattr(pipeline, stage, work(stage))
    monkeypatch.setattr(pipeline, "report_of", lambda run: run.folder)

    def again() -> list[str]:
        done.clear()
        pipeline.run_pipeline(recipe, output_dir=str(tmp_path / "run"))
        return list(done)

    assert again() == stages and again() == []
    for index, stage in enumerate(stages):
        folder = tmp_path / "run" / ("model" if stage == "distill" else stage)
        for name, data in (("stage.json", b"{"), ("model.safetensors", b"x")):
            (folder / name).write_bytes(data)
            assert again() == stages[index:] and again() == []
    assert "1/7 data: done before" in capsys.readouterr().out


def test_a_file_that_a_user_adds_to_a_stage_is_nobodys_business(tmp_path):
    facts = write_stage(tmp_path, facts_of("grpo"))
    (tmp_path / "notes.txt").write_text("x")
    assert read_stage(tmp_path, "grpo") == facts


# ---------------------------------------------------------------------- reports


REPORT = {
    "title": "a run", "seed": 0, "dense": {"perplexity": 4.0, "accuracy": 0.9, "bytes": 10},
    "pruned": {"sparsity": 0.8, "perplexity": 5.0, "accuracy": 0.8, "bytes": 10, "bytes_packed": 3},
    "baselines": {"wanda": {
        "oneshot": {"sparsity": 0.8, "perplexity": 9.0, "accuracy": 0.1},
        "distilled": {"sparsity": 0.8, "perplexity": 6.0, "accuracy": 0.5},
    }},
    "history": {"sparsity": [[1, 0.0], [2, 0.8]], "reward": [[1, 0.5], [2, 0.6]], "distill_loss": {"mama": [[1, 0.5]]}},
    "sparsity_by_matrix": [{"name": "a", "block": 0, "kind": "q_proj", "sparsity": 0.5, "size": 4}],
    "attribution": {"edges_log10": [-1, 0, 1], "kept": [1, 2], "pruned": [2, 1]},
    "trajectory": {
        "steps": [0, 5], "stages": [["sft", 0]],
        **{f"{kind}{suffix}": [0.1, 0.2] for kind in ("kept", "pruned") for suffix in ("", "_p10", "_p90")},
    },
    "stages": [{"name": "sft", "seconds": 1.0, "steps": 2, "tokens": 3}],
    "samples": [{"prompt": "1", "dense": "2", "pruned": "3"}],
    "protocol": {"tokens": 5, "sequence_length": 8}, "model": {"parameters": 5, "prunable": 4},
}
SPOTS = [
    ("dense",), ("dense", "perplexity"), ("pruned", "sparsity"), ("pruned", "bytes_packed"), ("baselines",),
    ("baselines", "wanda"), ("baselines", "wanda", "distilled", "accuracy"), ("history",), ("history", "reward"),
    ("history", "reward", 0), ("history", "distill_loss", "mama"), ("sparsity_by_matrix",), ("sparsity_by_matrix", 0),
    ("sparsity_by_matrix", 0, "block"), ("sparsity_by_matrix", 0, "kind"), ("attribution",), ("attribution", "kept"),
    ("attribution", "edges_log10"), ("trajectory",), ("trajectory", "kept"), ("trajectory", "stages"),
    ("trajectory", "steps"),
    ("stages",), ("stages", 0, "tokens"), ("samples", 0), ("samples", 0, "prompt"), ("protocol", "tokens"),
    ("model", "parameters"),
    ("title",),
]


@pytest.mark.parametrize("spot", SPOTS, ids=lambda spot: ".".join(map(str, spot)))
@pytest.mark.parametrize("value", [{"reward": 5}, [[["x"]]], "\ud800"], ids=["mapping", "list", "text"])
def test_reports_with_another_kind_of_value_anywhere(tmp_path, capsys, spot, value):
    check_report(REPORT, "report.json")
    report = json.loads(json.dumps(REPORT))
    inner = report
    for key in spot[:-1]:
        inner = inner[key]
    inner[spot[-1]] = value
    with refusal("report.json is damaged"):
        check_report(report, "report.json")


@pytest.mark.parametrize("text", [
    "", "{", "null", "[]", "5", "{}", "[" * 99999, '{"dense": {}}', '{"a": ' + "9" * 5000 + "}",
])
def test_damaged_reports_are_one_sentence_and_nothing_is_drawn(tmp_path, capsys, text):
    (tmp_path / "report.json").write_text(text)
    with unchanged(tmp_path):
        assert "report.json" in refused(capsys, "report", tmp_path)


@pytest.mark.parametrize("change", [
    {"sparsity_by_matrix": [{"block": 10**9, "kind": "a", "sparsity": 0.5}]}, {"pruned": {"sparsity": 2}},
    {"history": {"reward": [[1]], "sparsity": [[1, 0.5]]}},
    {"sparsity_by_matrix": [{"block": 0, "kind": "$\\frac$", "sparsity": 0.5}]},
    {"attribution": {"edges_log10": [0, 1], "kept": [1, 2], "pruned": [1]}},
])
def test_reports_that_cannot_be_drawn(tmp_path, capsys, change):
    (tmp_path / "report.json").write_text(json.dumps({**REPORT, **change}))
    with unchanged(tmp_path):
        assert "is damaged" in refused(capsys, "report", tmp_path)


def test_a_whole_report_is_written_and_measures_of_broken_models_are_shown(tmp_path):
    broken = {**REPORT, "pruned": {**REPORT["pruned"], "perplexity": float("nan")}}
    for report in (REPORT, broken):
        (tmp_path / "report.json").write_text(json.dumps(report))
        assert main(["report", str(tmp_path)]) == 0
        assert (tmp_path / "report.html").stat().st_size > 10000
    assert not list(tmp_path.glob(".*"))
