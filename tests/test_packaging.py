"""What an installed wheel needs: commands, bundled configs, licence, pins, and a quick `mama --help`."""

import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import mama_trl
from mama_trl.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().replace("_", "-").split("==") for line in lines if line and not line.startswith("#"))


def test_version_is_written_once_and_the_same():
    assert PROJECT["version"] == mama_trl.__version__


def test_console_script_points_to_main():
    module, _, name = PROJECT["scripts"]["mama"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_every_dependency_is_pinned_exactly():
    from packaging.requirements import Requirement

    known = pins()
    wanted = PROJECT["dependencies"] + [item for extra in PROJECT["optional-dependencies"].values() for item in extra]
    for line in wanted:
        requirement = Requirement(line)
        name = requirement.name.lower().replace("_", "-")
        assert name in known, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(known[name]), f"the pin of {name} is outside {requirement.specifier}"
    assert known["torch"] == "2.13.0"


def test_constraints_hold_no_local_versions_or_paths():
    text = (ROOT / "constraints.txt").read_text()
    assert "+cpu" not in text and "/" not in text and "@" not in text


@pytest.mark.parametrize("name, kind", [
    ("single", "NO"), ("ddp", "MULTI_GPU"), ("zero2", "DEEPSPEED"), ("zero3", "DEEPSPEED"), ("fsdp2", "FSDP"),
])
def test_accelerate_configs_are_bundled_and_name_their_engine(name, kind):
    config = yaml.safe_load((files("mama_trl") / "accelerate_configs" / f"{name}.yaml").read_text())
    assert config["distributed_type"] == kind
    assert config["use_cpu"] is False
    if kind == "DEEPSPEED":
        assert config["deepspeed_config"]["zero_stage"] == int(name[-1])
    if kind == "FSDP":
        assert config["fsdp_config"]["fsdp_version"] == 2


def test_every_command_has_a_module_and_training_ones_a_launcher():
    from mama_trl.cli import TRAINING

    for name in COMMANDS:
        assert (files("mama_trl") / "scripts" / f"{name}.py").is_file()
    for name in TRAINING:
        assert f'main(["{name}"' in (ROOT / "train" / f"{name}.py").read_text()


def test_help_does_not_import_torch():
    code = (
        "import sys; from mama_trl.cli import main; main(['--help']); "
        "heavy = {'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_export_can_be_imported():
    for name in mama_trl.__all__:
        assert getattr(mama_trl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        mama_trl.Nothing


@pytest.mark.slow
def test_wheel_holds_package_data(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(ROOT)], check=True
    )
    import zipfile

    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    for name in ("single", "ddp", "zero2", "zero3", "fsdp2"):
        assert f"mama_trl/accelerate_configs/{name}.yaml" in names
    assert not any(name.startswith(("tests/", "configs/", "train/")) for name in names)
    # Every file of the package that is not Python must be in the wheel too.
    for path in (ROOT / "mama_trl").rglob("*"):
        if path.is_file() and path.suffix in (".yaml", ".jinja", ".j2", ".html", ".css", ".typed"):
            assert str(path.relative_to(ROOT)) in names
