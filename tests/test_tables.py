"""What is declared in one table and told in another agrees: code, help and docs."""

import re
from importlib.resources import files
from pathlib import Path

import pytest

from benchmarks.composite import COMPOSITE
from mama_trl import config
from mama_trl.cli import COMMANDS, main
from mama_trl.demo.recipe import BASELINES
from mama_trl.indicators.formulas import COMPUTED
from mama_trl.indicators.trajectory import RULES
from mama_trl.report.plots import METHOD_COLOURS
from mama_trl.scripts.launch import ACCELERATE_CONFIGS
from mama_trl.solvers.methods import METHODS, NEEDS
from mama_trl.solvers.redistribution import MOVES
from mama_trl.training.schedule import RAMPS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def methods_table() -> str:
    """The rows of `METHODS` as docs/baselines.md has them."""
    rows = [
        (f"`{name}`", m.label, m.summary, m.needs, m.budget, "scope, indicators, redistribution" * m.tunable or "none")
        for name, m in METHODS.items()
    ]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows)


def test_every_indicator_has_a_formula_or_a_rule():
    from_optimizer = {"curvature"}
    assert set(config.INDICATORS) == set(COMPUTED) | set(RULES) | from_optimizer
    assert set(config.STATISTICS) == set(RULES) and not set(COMPUTED) & set(RULES)
    assert config.READS_INPUTS <= set(COMPUTED)
    assert set(config.RECORDED_BUDGETS) <= set(RULES) | from_optimizer
    assert set(config.BUDGETS) == {"uniform", *config.ONE_SHOT_BUDGETS, *config.RECORDED_BUDGETS}


def test_every_redistribution_moves_and_every_schedule_has_its_ramp():
    assert set(config.REDISTRIBUTIONS) == {*MOVES, "least_squares"}
    assert set(config.SCHEDULES) == {*RAMPS, "oneshot", "hold"}
    for ramp in RAMPS.values():
        assert ramp(1.0) == 1.0 and 0.0 < ramp(0.25) < ramp(0.75) < 1.0


def test_methods_are_told_alike(capsys):
    assert {method.needs for method in (*METHODS.values(), COMPOSITE)} == set(NEEDS)
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
    assert set(METHOD_COLOURS) == set(METHODS) and set(BASELINES) <= set(METHODS)
    with pytest.raises(SystemExit) as ended:
        main(["prune", "--methods"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and len(said.strip().splitlines()) == len(METHODS)
    for name, method in METHODS.items():
        assert name in said and f"{method.summary} (needs {method.needs})" in said
    (row,) = re.findall(r"^\| `mama prune.*$", README, re.MULTILINE)
    named = re.search(r"one-shot: `--method ([^;]*);", row)[1]
    assert set(re.findall(r"\w+", named)) == set(METHODS)


def test_the_docs_have_the_table_of_methods():
    page = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")
    assert methods_table() in page, f"docs/baselines.md wants these rows:\n{methods_table()}"


def test_help_names_every_choice(capsys):
    for command, tables in (
        ("prune", (config.INDICATORS, config.REDISTRIBUTIONS)),
        ("sft", (config.INDICATORS, config.REDISTRIBUTIONS, config.STATISTICS, config.SCHEDULES)),
    ):
        try:
            main([command, "--help"])
        except SystemExit:
            pass
        said = " ".join(capsys.readouterr().out.split())
        for table in tables:
            for name, what in table.items():
                assert name in said and what in said, (command, name)
        for name in (*config.SCOPES, *config.BUDGETS):
            assert name in said, (command, name)


def test_readme_names_every_command_and_config():
    for name in COMMANDS:
        assert re.search(rf"`mama [^|]*\b{name}\b|`{name}`", README), name
    for name in ACCELERATE_CONFIGS:
        assert (files("mama_trl") / "accelerate_configs" / f"{name}.yaml").is_file()
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in ACCELERATE_CONFIGS)
