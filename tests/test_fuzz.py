"""Random settings, recipes, flags and damage: success with a right result, or one sentence and nothing changed.

500 examples in the default suite, the same ones every time; 10,000 fresh ones in the slow suite.
"""

import json
import math
import os
import shutil
from dataclasses import fields
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from mama_trl import MamaConfig, MamaDistillationConfig, MamaGRPOConfig
from mama_trl.cli import COMMANDS, TRAINING, main
from mama_trl.compare import comparison
from mama_trl.config import PruningOptions
from mama_trl.demo import pipeline
from mama_trl.demo.stage_file import read_stage, write_stage
from mama_trl.errors import MamaError
from mama_trl.evaluation import loading
from mama_trl.evaluation.loading import check_model_source, load_tokenizer
from mama_trl.evaluation.text import read_text
from mama_trl.export.packed import load_packed, save_packed
from mama_trl.masks.maskset import MaskSet
from mama_trl.masks.tensors import read_tensors, write_tensors
from mama_trl.model.targets import find_targets
from mama_trl.pruning.prune import prune
from mama_trl.report.html import page_of
from mama_trl.scripts import training, training_parser
from mama_trl.training.inputs import _read as read_inputs

from .faults import ROOT, Reached, command_line, furnish, sentence_of, tiny_model, tree

SHARES = {"config": 150, "yaml": 60, "recipe": 60, "flags": 110, "damage": 120}
assert sum(SHARES.values()) == 500


def both_suites(kind: str):
    """Runs a property in the default suite, and as a slow test on twenty times as many examples."""

    def decorate(test):
        def parametrized(**arguments):
            strategies = arguments.pop("strategies")
            many = arguments.pop("many")
            check = given(**strategies)(lambda **drawn: test(**arguments, **drawn))
            settings(
                max_examples=SHARES[kind] * (20 if many else 1), deadline=None, database=None, derandomize=not many,
                suppress_health_check=list(HealthCheck),
            )(check)()

        return parametrized

    return decorate


MANY = pytest.mark.parametrize("many", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])

# ---------------------------------------------------------------------- values

WORDS = [
    "false", "true", "no", "1e-3", "nan", "inf", "-1", "0", "1", "0.5", "2:4", "4:8", "mlp", "", " ", "row", "global",
    "matrix", "cubic", "hold", "oneshot", "reward", "sensitivity", "activation", "magnitude=2", "none", "steps",
    "x" * 9000, "\ud800", "a\0b", "{", "[", "(", "../..", "/", "~", ".", "2_4", "١", "9" * 5000, "{question}", "linear",
    "\x1b[31m",
]
NUMBERS = st.one_of(
    st.integers(-3, 12), st.integers(), st.sampled_from([10**30, -(2**63), 10**400, 2**32]),
    st.floats(), st.sampled_from([0.0, 0.5, 0.99, 1.0, 1.5, -0.1, math.nan, math.inf]),
)
TEXTS = st.one_of(st.sampled_from(WORDS), st.text(max_size=8))
ATOMS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.one_of(ATOMS, ATOMS, st.lists(ATOMS, max_size=3), st.dictionaries(TEXTS, ATOMS, max_size=2))


def written_out(number) -> str:
    """A number as somebody types it."""
    return "9" * 5000 if abs(number) > 1e300 else str(number)


def holds(kind, value) -> bool:
    """Whether an accepted value is what its field declares, written out once more."""
    said = str(kind)
    if value is None:
        return "Optional" in said or "None" in said
    if "list[str]" in said:
        return isinstance(value, list) and all(type(item) is str for item in value)
    if "float" in said:
        return type(value) is float and math.isfinite(value)
    if "int" in said or said.startswith("typing.Annotated[int") or "Count" in said:
        return type(value) is int
    return type(value) is (bool if "bool" in said else str)


def check_config(config, given_values: dict) -> None:
    for option in fields(MamaConfig if isinstance(config, MamaConfig) else PruningOptions):
        annotations = {**PruningOptions.__annotations__, **MamaConfig.__annotations__}
        assert holds(annotations[option.name], getattr(config, option.name))
    for name in ("target_modules", "exclude_modules", "indicators", "statistics"):
        if isinstance(given_values.get(name), str):
            assert getattr(config, name) == [given_values[name]]
    assert 0 <= config.sparsity < 1


NAMES = [option.name for option in fields(MamaConfig)]
THEIRS = [
    "learning_rate", "max_steps", "num_train_epochs", "per_device_train_batch_size", "output_dir", "seed", "optim",
    "lr_scheduler_type", "report_to", "model_init_kwargs", "eval_strategy", "save_steps", "logging_steps", "bf16",
    "run_name", "gradient_checkpointing", "adam_beta2", "warmup_steps", "max_length", "temperature", "beta",
    "cross_entropy_weight", "num_generations", "reward_weights", "scale_rewards", "loss_type", "fsdp",
    "accelerator_config", "dataset_kwargs",
]
EVERY = sorted({option.name for cls in (MamaGRPOConfig, MamaDistillationConfig) for option in fields(cls)})


@MANY
def test_fields_of_every_config(many):
    @both_suites("config")
    def check(cls, values):
        known = {option.name for option in fields(cls)}
        values = {name: value for name, value in values.items() if name in known}
        plain = {} if cls in (MamaConfig, PruningOptions) else {"use_cpu": True, "bf16": False}
        try:
            config = cls(**{**plain, **values})
        except MamaError as error:
            sentence_of(error)
        else:
            check_config(config, values)

    check(many=many, strategies={
        "cls": st.sampled_from([MamaConfig, PruningOptions, MamaGRPOConfig, MamaDistillationConfig]),
        "values": st.one_of(
            st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=3),
            st.dictionaries(st.sampled_from(NAMES + THEIRS), VALUES, min_size=1, max_size=2),
            st.dictionaries(st.sampled_from(EVERY), VALUES, min_size=1, max_size=2),
        ),
    })


# ---------------------------------------------------------------------- files of settings, recipes, flags


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """`model`, `teacher`, texts, a recipe, and a folder that holds somebody's work."""
    return furnish(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def halted(monkeypatch):
    """Parsers made once; every command stops where its compute would begin."""

    def reached(*args, **kwargs):
        raise Reached

    for name in COMMANDS:
        module = import_module(f"mama_trl.scripts.{name}")
        monkeypatch.setattr(module, "make_parser", lru_cache(maxsize=1)(module.make_parser))
    for module in (loading, comparison):
        monkeypatch.setattr(module, "load_model", reached)
    monkeypatch.setattr(training, "trainer_of", reached)
    monkeypatch.setattr(pipeline, "_stages", reached)
    monkeypatch.setattr(training_parser, "hand_over", reached)


def run(place: Path, capsys, argv: list[str]) -> None:
    """`mama argv` ends with 0, reaches its compute, or refuses in one sentence; what is there stays as it is."""
    before = tree(place)
    try:
        code = main([str(item) for item in argv])
    except (Reached, SystemExit):
        code = None
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    if code == 2:
        lines = [line for line in shown.err.splitlines() if line.startswith("mama: ")]
        assert len(lines) == 1 and len(lines[0]) < 300, shown.err
    after = tree(place)
    lost = {name for name, content in before.items() if after.get(name) != content}
    assert not lost, lost
    for path in (place / name for name in set(after) - set(before)):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def some_yaml(value) -> str:
    try:
        return yaml.safe_dump(value, allow_unicode=True)
    except (UnicodeEncodeError, yaml.YAMLError, ValueError):
        return "a: 1"


@MANY
def test_files_of_settings(place, halted, capsys, monkeypatch, many):
    monkeypatch.chdir(place)
    names = [*NAMES, *NAMES, *EVERY, "dataset_name", "teacher_model_name_or_path", "overwrite", "reward_funcs", "env"]

    @both_suites("yaml")
    def check(command, values, text, raw):
        path = place / "settings.yaml"
        text = text if text is not None else some_yaml(values)
        path.write_bytes(raw if raw is not None else text.encode("utf-8", "replace"))
        run(place, capsys, [*command_line(place, command), "--config", path])
        path.unlink()

    check(many=many, strategies={
        "command": st.sampled_from(list(TRAINING)),
        "values": st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3),
        "text": st.one_of(st.none(), st.none(), st.none(), st.text(max_size=30), st.sampled_from([
            "- a", "a: 1\n---\nb: 2", "a: [", "a: " + "[" * 3000, "a: &x [*x]", "sparsity: 0.5\nsparsity: 0.6",
            "? [1]\n: 2",
        ])),
        "raw": st.one_of(
            st.none(), st.none(), st.none(), st.binary(max_size=20), st.just("sparsity: 0.5".encode("utf-16"))
        ),
    })


@MANY
def test_recipes(place, halted, capsys, monkeypatch, many):
    monkeypatch.chdir(place)  # where an output_dir such as "false" lies
    recipe = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    places = [(None, name) for name in recipe] + [
        (name, inner) for name, section in recipe.items() if isinstance(section, dict) for inner in section
    ] + [(stage, name) for stage in ("pretrain", "sft", "grpo", "distill") for name in THEIRS[:12]]

    @both_suites("recipe")
    def check(changes, overwrite, output):
        values = json.loads(json.dumps(recipe))
        values["output_dir"] = str(place / "out")
        for (section, name), value in changes:
            if section is None:
                values[name] = value
            elif isinstance(values.get(section), dict):
                values[section][name] = value
        path = place / "recipe.yaml"
        path.write_text(some_yaml(values))
        argv = ["run", path, *(["--overwrite"] if overwrite else [])]
        run(place, capsys, argv + (["--output_dir", output(place)] if output else []))
        path.unlink()

    check(many=many, strategies={
        "changes": st.lists(st.tuples(st.sampled_from(places), VALUES), min_size=1, max_size=2),
        "overwrite": st.booleans(),
        "output": st.sampled_from([
            None, None, None, lambda p: p, lambda p: p / "work", lambda p: p / "model", lambda p: "/", lambda p: ".",
            lambda p: "..", lambda p: "", lambda p: "~", lambda p: p / "recipe.yaml", lambda p: p / ("x" * 300),
        ]),
    })


@MANY
def test_flags_of_every_command(place, halted, capsys, monkeypatch, many):
    monkeypatch.chdir(place / "work")
    flags = {}
    for command in COMMANDS:
        parser = import_module(f"mama_trl.scripts.{command}").make_parser()
        flags[command] = sorted({option for action in parser._actions for option in action.option_strings})

    @both_suites("flags")
    def check(command, picks, values, somewhere):
        argv = list(command_line(place, command))
        for pick, value in zip(picks, values):
            argv += [flags[command][pick % len(flags[command])], value]
        if somewhere is not None and command != "run":
            argv[-1] = somewhere(place)
        run(place, capsys, argv)

    check(many=many, strategies={
        "command": st.sampled_from(list(COMMANDS)),
        "picks": st.lists(st.integers(0, 10**6), min_size=1, max_size=3),
        "values": st.lists(st.one_of(TEXTS, NUMBERS.map(written_out)), min_size=3, max_size=3),
        "somewhere": st.sampled_from([
            None, None, None, None, lambda p: p / "model", lambda p: p / "work", lambda p: p / "train.txt", lambda p: p,
            lambda p: p / "model" / "sub",
        ]),
    })


# ---------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One file of each kind that is written or read: (path, reader that gives something comparable)."""
    root = tmp_path_factory.mktemp("written")
    model = AutoModelForCausalLM.from_pretrained(tiny_model(root / "model", num_hidden_layers=1))
    masks = prune(model, method="magnitude", sparsity=0.5, progress=False)
    model.save_pretrained(root / "model")
    masks.save(root / "model")
    save_packed(model, masks, root / "packed.safetensors")
    from mama_trl.engines.detect import shards_of
    from mama_trl.indicators.trajectory import Trajectory

    trajectory = Trajectory(shards_of((t.name, t.parameter) for t in find_targets(model)), ["sensitivity"])
    trajectory.save(root / "model")
    inputs = {"tokens": torch.arange(40), "length": torch.tensor(8)}
    write_tensors(root / "inputs.safetensors", inputs, {"format": "mama-inputs-2"})
    write_tensors(root / "rows.safetensors", {"text": torch.arange(40).view(5, 8)}, {"format": "mama-rows-1"})
    (root / "sft").mkdir()
    (root / "sft" / "model.bin").write_bytes(bytes(range(200)))
    write_stage(root / "sft", {
        "name": "sft", "seconds": 1.0, "steps": 2, "tokens": 3, "perplexity": 4.0, "accuracy": 0.5
    })
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": f"number {n}"}) + "\n" for n in range(5)))
    report = {
        "dense": {"perplexity": 4.0, "accuracy": 0.9}, "pruned": {"sparsity": 0.8, "perplexity": 5.0, "accuracy": 0.8},
        "stages": [{"name": "sft", "seconds": 1.0, "steps": 2, "tokens": 3}], "seed": 0, "title": "a run",
        "samples": [{"prompt": "1", "dense": "2", "pruned": "3"}],
        "sparsity_by_matrix": [{"block": 0, "kind": "q", "sparsity": 0.5}],
    }
    (root / "report.json").write_text(json.dumps(report))

    def statistics():
        other = Trajectory(trajectory.shards, ["sensitivity"])
        return other.load(root / "model", resume=True) and sorted(other.counts)

    def page():
        from mama_trl.report.check import check_report

        stored = json.loads((root / "report.json").read_text(encoding="utf-8"))
        check_report(stored, "report.json")
        return len(page_of(stored, {})) > 1000

    def as_sentence(read):
        """JSON is read by the command, which turns its errors into a sentence."""
        def inner():
            try:
                return read()
            except (ValueError, RecursionError) as error:
                raise error if isinstance(error, MamaError) else MamaError(f"report.json is damaged: {error}") from None
        return inner

    readers = {
        root / "model" / "mama" / "masks.safetensors": (lambda: MaskSet.load(root / "model", model).digest(), True),
        root / "model" / "mama" / "statistics.safetensors": (statistics, True),
        root / "packed.safetensors": (lambda: str(load_packed(root / "packed.safetensors")), True),
        root / "inputs.safetensors": (lambda: str(read_inputs(root / "inputs.safetensors")), True),
        root / "rows.safetensors": (lambda: str(read_tensors(root / "rows.safetensors", "data file", "again")), True),
        root / "sft" / "stage.json": (lambda: read_stage(root / "sft", "sft"), False),
        root / "sft" / "model.bin": (lambda: read_stage(root / "sft", "sft"), False),
        root / "model" / "model.safetensors": (lambda: check_model_source(str(root / "model")), None),
        root / "model" / "config.json": (lambda: check_model_source(str(root / "model")), None),
        root / "model" / "tokenizer.json": (lambda: load_tokenizer(str(root / "model")) and None, None),
        root / "model" / "tokenizer_config.json": (lambda: load_tokenizer(str(root / "model")) and None, None),
        root / "texts.jsonl": (lambda: len(read_text(root / "texts.jsonl")) > 0, None),
        root / "report.json": (as_sentence(page), None),
    }
    originals = {path: (path.read_bytes(), read()) for path, (read, _) in readers.items()}
    return readers, originals


def damaged(data: bytes, kind: str, at: float, noise: bytes, value) -> bytes:
    """`data` with a fault of one kind at a relative place."""
    where = min(int(at * len(data)), max(len(data) - 1, 0))
    if kind == "cut":
        return data[:where]
    if kind == "flip":
        return data[:where] + bytes([data[where] ^ (noise[0] or 1)]) + data[where + 1 :]
    if kind == "replace":
        return data[:where] + noise + data[where + len(noise) :]
    if kind == "insert":
        return data[:where] + noise + data[where:]
    if kind == "delete":
        return data[:where] + data[where + len(noise) :]
    if kind == "whole":
        return noise * 3
    try:  # another value somewhere in the JSON
        stored = json.loads(data.decode().splitlines()[0] if kind == "first line" else data)
        spots = [(stored, key) for key in stored]
        for holder, key in spots:
            inner = holder[key]
            if isinstance(inner, (dict, list)) and len(spots) < 500:
                spots += [(inner, k) for k in (inner if isinstance(inner, dict) else range(len(inner)))]
        holder, key = spots[int(at * len(spots)) % len(spots)]
        holder[key] = value
        return json.dumps(stored).encode()
    except (ValueError, TypeError, UnicodeDecodeError, IndexError):
        return data[:where]


@MANY
def test_damaged_files_of_every_kind(written, many):
    readers, originals = written

    @both_suites("damage")
    def check(path, kind, at, noise, value):
        data, right = originals[path]
        read, noticed = readers[path]
        changed = damaged(data, kind, at, noise, value)
        path.write_bytes(changed)
        try:
            got = read()
        except MamaError as error:
            sentence_of(error)
        else:
            # What carries checksums is either as it was, or refused (a stage: None, to be done again).
            if noticed is True:
                assert got == right, f"damage of {path.name} went by"
            elif noticed is False:
                assert got in (None, right)
        finally:
            path.write_bytes(data)
            os.utime(path)

    check(many=many, strategies={
        "path": st.sampled_from(sorted(readers)),
        "kind": st.sampled_from(["cut", "flip", "flip", "replace", "insert", "delete", "whole", "json", "json"]),
        "at": st.floats(0, 1, exclude_max=True),
        "noise": st.binary(min_size=1, max_size=16),
        "value": VALUES.filter(lambda v: not (isinstance(v, float) and v != v)),
    })
