"""Settings: one declared type and range a field, in Python, YAML and on the command line; else one sentence."""

import ast
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Optional

import pytest

import mama_trl
from mama_trl import MamaConfig, MamaDistillationConfig, MamaGRPOConfig
from mama_trl.config import PruningOptions
from mama_trl.disk.yaml_files import read_settings
from mama_trl.errors import LIMIT, MamaError, one_line, shown
from mama_trl.fields import Range, check_mapping, check_value
from mama_trl.scripts import grpo, sft, training_parser
from mama_trl.training.schedule import Schedule

from .faults import refusal, refused

PLAIN = {"use_cpu": True, "bf16": False}
CONFIGS = [(MamaConfig, {}), (MamaGRPOConfig, PLAIN), (MamaDistillationConfig, PLAIN)]


# ---------------------------------------------------------------------- one field


@pytest.mark.parametrize("hint, value, right", [
    (float, 1, 1.0), (int, 3.0, 3), (Optional[float], None, None), (list[str], "mlp", ["mlp"]),
    (list[str], ("a",), ["a"]),
    (Optional[list[str]], "mlp", ["mlp"]), (Annotated[float, Range(0, 1)], 1, 1.0), (Literal["a", "b"], "a", "a"),
])
def test_values_as_their_field_means_them(hint, value, right):
    got = check_value("x", value, hint)
    assert got == right and type(got) is type(right)


@pytest.mark.parametrize("hint, word, right", [
    (bool, "false", False), (bool, "no", False), (bool, "True", True), (float, "1e-3", 1e-3), (int, "6_000", 6000),
    (Optional[int], "7", 7),
])
def test_words_are_read_where_words_are_meant(hint, word, right):
    assert check_value("x", word, hint, words=True) == right
    with refusal("`x` is"):
        check_value("x", word, hint)


@pytest.mark.parametrize("hint, value", [
    (float, True), (float, math.nan), (float, math.inf), (float, "0.5"), (float, None), (float, [0.5]),
    (float, 10**400),
    (int, True), (int, 2.5), (int, 2**63), (int, "3"), (int, math.inf), (bool, 1), (bool, "false"), (bool, None),
    (str, 5), (str, None), (str, b"x"), (str, "a\0b"), (str, "\ud800"), (list[str], 5), (list[str], [5]),
    (list[str], {"a": 1}), (list[str], None), (Annotated[float, Range(0, 1)], 1.5), (Annotated[int, Range(1)], 0),
    (Annotated[float, Range(0, above=True)], 0), (Literal["a", "b"], "c"), (dict, [1]),
])
def test_what_does_not_fit_is_one_sentence(hint, value):
    with refusal("`learning_rate` is .*: use "):
        check_value("learning_rate", value, hint)


def test_sections_are_mappings_of_known_names():
    @dataclass
    class Section:
        share: Annotated[float, Range(0, 1)] = 0.5
        names: Optional[list[str]] = None

    assert check_mapping(None, Section, "section x") == {}
    assert check_mapping({"share": "1e-1", "names": "a"}, Section, "section x") == {"share": 0.1, "names": ["a"]}
    for wrong in ([1], "text", 5, {"shaer": 0.5}, {"share": 2}, {"share": "much"}):
        with refusal("^section x"):
            check_mapping(wrong, Section, "section x")
    with refusal("Did you mean share"):
        check_mapping({"shaer": 0.5}, Section, "section x")


# ---------------------------------------------------------------------- the configs


@pytest.mark.parametrize("cls, plain", CONFIGS)
@pytest.mark.parametrize("name", ["target_modules", "exclude_modules", "indicators", "statistics"])
def test_one_text_is_a_list_of_one(cls, plain, name):
    text = {"indicators": "activation", "statistics": "sensitivity"}.get(name, "mlp")
    assert getattr(cls(**plain, **{name: text}), name) == [text]


def test_one_expression_prunes_the_same_modules_in_python_yaml_and_on_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    lines = ["target_modules: mlp", "indicators: magnitude", "pattern: 2:4", "eval_strategy: no", "inherit_masks: no"]
    recipe.write_text("\n".join(lines))
    from_yaml, _, trainer, *_ = training_parser.parse(sft.make_parser(), ["--config", str(recipe), "--use_cpu", "true"])
    flags = ["--target_modules", "mlp", "--indicators", "magnitude", "--pattern", "2:4", "--inherit_masks", "false"]
    from_flags, *_ = training_parser.parse(sft.make_parser(), [*flags, "--use_cpu", "true"])
    plain = MamaConfig(target_modules="mlp", indicators="magnitude", pattern="2:4", inherit_masks=False)
    assert from_yaml == from_flags == plain and plain.target_modules == ["mlp"]
    assert trainer.eval_strategy == "no"
    recipe.write_text("reward_funcs: accuracy\n")
    _, arguments, *_ = training_parser.parse(grpo.make_parser(), ["--config", str(recipe), "--use_cpu", "true"])
    assert arguments.reward_funcs == ["accuracy"]


OURS = {
    "sparsity": ["0.5", None, True, [0.5], math.nan, -0.1, 1.0], "pattern": [124, None, "4:2", "2:4:8", ["2:4"]],
    "scope": [None, "rows", 1, ["row"]], "indicators": [None, [], [1], "x", ["activation="], ["reward=nan"], {"a": 1}],
    "budget": [1, "fair", ["uniform"]], "budget_blend": [True, "0.3", -0.1, 1.1, math.nan, math.inf],
    "redistribution": [None, False, "least"], "refine": [None, "sometimes", 2],
    "target_modules": ["", ["("], 5, [None], {"mlp": 1}], "exclude_modules": ["[", [""], True],
    "mask_schedule": [None, "linear", 1],
    "mask_start": [math.nan, math.inf, -1, "0.1", True, 1.5], "mask_end": [math.nan, -math.inf, [1], 2.5],
    "mask_interval": [0, -1, 2.5, True, "3"], "calibration_tokens": [0, -5, 1.5, "many", 2**80],
    "statistics": [5, ["speed"], [None], "everything"], "inherit_masks": ["false", 0, 1, None, "no"],
    "enforce_masks": ["false", 0, 1, None, "no"],
}


@pytest.mark.parametrize("cls, plain", CONFIGS)
@pytest.mark.parametrize("name, value", [(name, value) for name, values in OURS.items() for value in values])
def test_every_field_of_ours_refuses_what_it_does_not_mean(cls, plain, name, value):
    values = {"mask_schedule": "cubic", name: value} if name.startswith("mask_") else {name: value}
    with refusal(f"`{name}`"):
        cls(**plain, **values)


def test_every_field_is_among_them():
    from dataclasses import fields

    assert {option.name for option in fields(MamaConfig)} == set(OURS)
    assert {option.name for option in fields(PruningOptions)} < set(OURS)


THEIRS = {
    "learning_rate": [-1, math.nan, "fast", [1e-3]], "max_steps": [0, -2, 2.5, "ten"],
    "num_train_epochs": [0, -1, None],
    "per_device_train_batch_size": [0, "8", True], "seed": [-1, 2**40, 0.5], "optim": ["adam", 3],
    "save_steps": [0, None],
    "lr_scheduler_type": ["quick", 1], "eval_strategy": [False, "sometimes"], "model_init_kwargs": [[1], "{", "abc"],
    "report_to": [3, {"a": 1}], "output_dir": [5, "a\0b"], "adam_beta2": [1.0, -0.1],
    "gradient_accumulation_steps": [0],
    "accelerator_config": ["nowhere.json", 5],
    "logging_steps": [0, True], "max_grad_norm": [-1.0], "warmup_steps": [-1], "temperature": [0, math.inf, "hot"],
}


@pytest.mark.parametrize("cls", [MamaGRPOConfig, MamaDistillationConfig])
@pytest.mark.parametrize("name, value", [(name, value) for name, values in THEIRS.items() for value in values])
def test_the_trainers_own_fields_refuse_nonsense_in_one_sentence(cls, name, value):
    with refusal(f"`{name}`"):
        cls(**PLAIN, **{name: value})


@pytest.mark.parametrize("cls, name, value", [
    (MamaDistillationConfig, "cross_entropy_weight", -1), (MamaDistillationConfig, "cross_entropy_weight", math.nan),
    (MamaDistillationConfig, "teacher_model_name_or_path", 5), (MamaDistillationConfig, "max_length", 0),
    (MamaGRPOConfig, "num_generations", 1), (MamaGRPOConfig, "beta", -1),
    (MamaGRPOConfig, "reward_weights", [math.nan]),
    (MamaGRPOConfig, "scale_rewards", "loudly"), (MamaGRPOConfig, "loss_type", "none"), (MamaGRPOConfig, "top_p", 0),
    (MamaGRPOConfig, "max_completion_length", 0), (MamaGRPOConfig, "importance_sampling_level", "word"),
])
def test_fields_of_one_trainer(cls, name, value):
    with refusal(f"`{name}`"):
        cls(**PLAIN, **{name: value})


def test_what_trl_itself_takes_is_taken():
    assert MamaGRPOConfig(**PLAIN, scale_rewards=False).scale_rewards == "none"
    assert MamaGRPOConfig(**PLAIN, loss_type="grpo", num_generations=4).num_generations == 4
    config = MamaDistillationConfig(**PLAIN, lr_scheduler_type="cosine", warmup_steps=0.1, report_to=["none"])
    assert config.warmup_steps == 0.1
    with refusal("divisible"):
        MamaGRPOConfig(**PLAIN, num_generations=3)


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("text, said", [
    ("sparsity: 0.5\n---\nsparsity: 0.6", "no valid YAML"), ("- sparsity", "holds no"), ("sparsity", "holds no"),
    ("", "holds no"),
    ("a: [", "no valid YAML"), ("sparsity: 0.5\nsparsity: 0.6", "stands twice"), ("5: 6", "where the name"),
    ("a: " + "[" * 5000, "no valid YAML"), ("a: &x [*x]", "too deep"),
    ("a: !!python/object:os.system x", "no valid YAML"),
    ("? [1]\n: 2", "no valid YAML"), ("a: " + "9" * 5000, "no valid YAML"), ("\0", "no valid YAML"),
])
def test_files_that_hold_no_settings(tmp_path, capsys, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert said in refused(capsys, "sft", "--config", path)
    assert said in refused(capsys, "run", path)


@pytest.mark.parametrize("data", ["sparsity: 0.5".encode("utf-16"), b"\xff\xfe\x00", b"sparsity: \x80"])
def test_files_that_are_no_utf8(tmp_path, capsys, data):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    assert "cannot be read" in refused(capsys, "sft", "--config", path)
    assert "cannot be read" in refused(capsys, "run", path)
    assert "cannot be read" in refused(capsys, "sft", "--config", tmp_path)


def test_yaml_means_what_it_looks_like(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("a: 2:4\nb: no\nc: 1e-3\nd: 6_000\ne: .inf\nf: ~\ng:\nh: 2020-01-01\ni: '1'\nj: true\nk: 010\n")
    assert read_settings(path, "it") == {
        "a": "2:4", "b": "no", "c": 1e-3, "d": 6000, "e": math.inf, "f": None, "g": None, "h": "2020-01-01", "i": "1",
        "j": True, "k": 10,
    }


@pytest.mark.parametrize("line, said", [
    ("sparsity: [0.5]", "`sparsity`"), ("sparsity: much", "`sparsity`"), ("indicators: {a: 1}", "`indicators`"),
    ("inherit_masks: maybe", "`inherit_masks`"), ("learning_rate: -1", "`learning_rate`"), ("optim: [adam]", "`optim`"),
    ("output_dir: 5", "`output_dir`"), ("overwrite: sometimes", "`overwrite`"), ("env: 5", "`env`"),
    ("env: {A: [1]}", "`env`"),
    ("max_steps: true", "`max_steps`"), ("dtype: float33", "`dtype`"),
    ("model_init_kwargs: '{'", "`model_init_kwargs`"),
    ("datasets: x", "datasets"), ("sparsiti: 0.5", "Did you mean sparsity"), ("learning_rate: .nan", "`learning_rate`"),
])
def test_config_files_with_wrong_values(tmp_path, capsys, line, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(line + "\n")
    assert said in refused(capsys, "sft", "--config", path, "--use_cpu", "true")


def test_env_of_a_config_file_is_set_only_when_all_is_well(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    monkeypatch.delenv("MAMA_TEST_ENV", raising=False)
    path.write_text("env: {MAMA_TEST_ENV: no}\nlearning_rate: -1\n")
    import os

    with refusal("`learning_rate`"):
        training_parser.parse(sft.make_parser(), ["--config", str(path), "--use_cpu", "true"])
    assert "MAMA_TEST_ENV" not in os.environ
    path.write_text("env: {MAMA_TEST_ENV: no}\n")
    training_parser.parse(sft.make_parser(), ["--config", str(path), "--use_cpu", "true"])
    assert os.environ.pop("MAMA_TEST_ENV") == "no"


def test_a_parser_keeps_its_own_defaults(tmp_path):
    parser = sft.make_parser()
    path = tmp_path / "recipe.yaml"
    path.write_text("sparsity: 0.25\n")
    assert training_parser.parse(parser, ["--config", str(path), "--use_cpu", "true"])[0].sparsity == 0.25
    assert training_parser.parse(parser, ["--use_cpu", "true"])[0].sparsity == 0.5


# ---------------------------------------------------------------------- when, and the sentence


@pytest.mark.parametrize("kind, start, end, total", [
    ("oneshot", 101, 0.5, 100), ("cubic", 101, 0.5, 100), ("cubic", 10, 200, 100), ("oneshot", 10**30, 0.5, 100),
])
def test_masks_that_would_never_be_computed(kind, start, end, total):
    with refusal("last step"):
        Schedule.resolve(kind, 0.5, start, end, 10, total)
    assert Schedule.resolve(kind, 0.0, start, end, 10, total).last == 0  # nothing to compute, nothing to refuse
    assert Schedule.resolve("hold", 0.5, start, end, 10, total).last == 0


def test_the_last_step_is_early_enough():
    assert Schedule.resolve("oneshot", 0.5, 100, 0.5, 10, 100).last == 100
    assert Schedule.resolve("cubic", 0.5, 0.1, 0.999, 10, 3).last == 3


@pytest.mark.parametrize("text", [
    "x" * 5000, "a " * 3000, "two\nlines", "\x1b[31mred", "\ud800", "/" + "folder/" * 800 + " is gone",
])
def test_every_error_is_one_printable_line(text):
    said = str(MamaError(f"`name` is {text}: mend it."))
    assert len(said) <= LIMIT < 300 and said.isprintable() and said.startswith("`name` is")


def test_values_are_shown_short_whatever_they_are():
    endless: list = []
    endless.append(endless)
    for value in (10**6000, "x" * 10**6, endless, {"a": [[[1]]]}, types.SimpleNamespace(x="y" * 1000), b"\xff" * 1000):
        assert len(shown(value)) < 120
    assert one_line("short") == "short"


def test_no_model_is_ever_loaded_without_saying_whose_code_may_run():
    """Where it is left out, transformers asks on the terminal, and piped input would answer."""
    for path in Path(mama_trl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = getattr(node.func.value, "id", "")
            if node.func.attr in ("from_pretrained", "from_config") and owner.startswith("Auto"):
                said = [keyword.arg for keyword in node.keywords]
                assert "trust_remote_code" in said or None in said, f"{path}:{node.lineno}"
