"""Nothing is destroyed: outputs against inputs, one run at a time in a folder, links, and what may be deleted."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from mama_trl.cli import COMMANDS, TRAINING, main
from mama_trl.compare import comparison
from mama_trl.demo import pipeline
from mama_trl.disk.folders import LOCK, check_links, check_output_dir, check_output_file
from mama_trl.disk.lock import locked
from mama_trl.disk.machine import refusal_of
from mama_trl.disk.paths import check_paths
from mama_trl.disk.removal import remove_model_files
from mama_trl.disk.writing import write_folder, write_json, write_text
from mama_trl.errors import MamaError
from mama_trl.evaluation import loading
from mama_trl.scripts import training

from .faults import ROOT, Reached, command_line, furnish, refusal, refused, tree, unchanged

WITH_FOLDER = [name for name in COMMANDS if name not in ("evaluate", "report")]


@pytest.fixture
def place(tmp_path):
    return furnish(tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The same, for tests that change nothing in it."""
    return furnish(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def halted(monkeypatch):
    """Commands stop where their compute would begin."""

    def reached(*args, **kwargs):
        raise Reached

    for module in (loading, comparison):
        monkeypatch.setattr(module, "load_model", reached)
    monkeypatch.setattr(training, "trainer_of", reached)
    monkeypatch.setattr(pipeline, "_stages", reached)


def with_output(argv: list[str], output) -> list[str]:
    return [*argv[:-1], str(output)]


# ---------------------------------------------------------------------- outputs and inputs


@pytest.mark.parametrize("output, given, fits", [
    ("a", "b", True), ("a", "a", False), ("a/../a", "a", False), ("a/new", "a", False), ("a", "a/b", False),
    ("link", "a", False), ("link/new", "a", False), ("a", "link", False), ("f.txt", "f.txt", False),
    ("hard.txt", "f.txt", False), ("new.txt", "f.txt", True), ("a", "owner/model", True), ("ab", "a", True),
])
def test_no_output_is_holds_or_lies_within_an_input(tmp_path, monkeypatch, output, given, fits):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "f.txt").write_text("x")
    os.link("f.txt", "hard.txt")
    os.symlink("a", "link")
    if fits:
        check_paths([output], {"the model": given})
        check_paths([tmp_path / output], {"the model": given})
    else:
        with refusal("the model"):
            check_paths([output], {"the model": given})
        with refusal("the model"):
            check_paths([tmp_path / output], {"the model": given})


def test_a_recipe_may_lie_beside_its_output_and_not_under_its_name(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("a: 1")
    inputs = {"the recipe": tmp_path / "out" / "recipe.yaml"}
    check_paths([tmp_path / "out"], inputs, beside=("the recipe",))
    with refusal("the recipe"):
        check_paths([tmp_path / "out"], inputs)
    with refusal("the recipe"):
        check_paths([tmp_path / "out" / "recipe.yaml"], inputs, beside=("the recipe",))


@pytest.mark.parametrize("where", ["model", "model/inside", ".", "train.txt"])
@pytest.mark.parametrize("command", [name for name in WITH_FOLDER if name != "run"])
def test_every_command_refuses_to_write_over_its_model_and_text(shared, halted, capsys, command, where):
    argv = with_output(command_line(shared, command), shared / where)
    overwrite = ["--overwrite", "true"] if command in TRAINING else ["--overwrite"]
    with unchanged(shared):
        refused(capsys, *argv)
        refused(capsys, *argv, *overwrite)


@pytest.mark.parametrize("flags", [
    ["distill", "--output_dir", "{p}/teacher"], ["grpo", "--output_dir", "{p}/task.jsonl"],
    ["sft", "--output_dir", "{p}/model", "--resume_from_checkpoint", "{p}/teacher"],
    ["sft", "--output_dir", "{p}/teacher", "--resume_from_checkpoint", "{p}/teacher"],
    ["sft", "--output_dir", "{p}/teacher/new", "--resume_from_checkpoint", "{p}/teacher"],
    ["sft", "--output_dir", "{p}/conf", "--config", "{p}/conf/config.json"],
    ["sft", "--output_dir", "{p}/conf", "--accelerate_config", "{p}/conf"],
    ["sft", "--output_dir", "{p}/model", "--config", "{p}/datasets.yaml"],
    ["sft", "--output_dir", "{p}/train.txt", "--config", "{p}/datasets.yaml"],
    ["sft", "--output_dir", "{p}/conf", "--chat_template_path", "{p}/conf/chat_template.jinja"],
])
def test_training_writes_over_nothing_that_it_reads(place, halted, capsys, flags):
    (place / "conf").mkdir()
    (place / "conf" / "config.json").write_text('{"sparsity": 0.5}')
    (place / "conf" / "chat_template.jinja").write_text("x")
    mixture = {"datasets": [{"path": "text", "data_files": str(place / "train.txt")}]}
    (place / "datasets.yaml").write_text(yaml.safe_dump(mixture))
    flags = [item.format(p=place) for item in flags]
    argv = [*command_line(place, flags[0])[:-2], *flags[1:], "--overwrite", "true"]
    with unchanged(place):
        refused(capsys, *argv)


def test_a_config_beside_the_outputs_is_fine(place, halted):
    (place / "conf").mkdir()
    (place / "conf" / "recipe.yaml").write_text("sparsity: 0.25\n")
    argv = [*with_output(command_line(place, "sft"), place / "conf"), "--config", place / "conf" / "recipe.yaml"]
    with pytest.raises(Reached), unchanged(place):
        main([str(item) for item in [*argv, "--overwrite", "true"]])


@pytest.mark.parametrize("output", [
    "{p}/train.txt", "{p}/model/config.json", "{p}/model/model.safetensors", "{p}/model/new.json", "{p}/model",
    "{p}/none/x.json", "~nosuchuser/x.json",
    "{p}/linked.json", "/dev/null", "/dev/stdout", "", "{p}/" + "x" * 300, "{p}/hard.txt", "{p}/train.txt/x.json",
])
def test_evaluate_writes_its_numbers_over_nothing(place, halted, capsys, output):
    os.symlink(place / "train.txt", place / "linked.json")
    os.link(place / "train.txt", place / "hard.txt")
    with unchanged(place):
        refused(capsys, *with_output(command_line(place, "evaluate"), output.format(p=place)))


def test_a_home_folder_is_the_same_for_checks_and_for_what_is_written(place, monkeypatch):
    """Also where no shell has resolved its sign: in `--json=~/x`, or in a recipe."""
    monkeypatch.setenv("HOME", str(place / "work"))
    monkeypatch.chdir(place)
    assert main([*command_line(place, "evaluate")[:-2], "--json=~/numbers.json"]) == 0
    assert (place / "work" / "numbers.json").is_file()
    recipe = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    (place / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "output_dir": "~/run"}))
    stages = []
    monkeypatch.setattr(pipeline, "_stages", lambda run: stages.append(run) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["run", str(place / "recipe.yaml")])
    assert stages[0].folder == place / "work" / "run" and (stages[0].folder / "run.json").is_file()
    assert not (place / "~").exists()


def test_a_place_for_json_that_cannot_be_written_is_said_first(place, halted, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # root may write everywhere
    assert "cannot be written" in refused(capsys, *command_line(place, "evaluate"))
    for command in ("prune", "levels", "sft"):
        assert "cannot be written" in refused(capsys, *command_line(place, command))


@pytest.mark.parametrize("command", WITH_FOLDER)
@pytest.mark.parametrize("name", [
    "", " ", "{p}/" + "x" * 300, "{p}/train.txt/new", "{p}/\ud800", "x\0y", "~nosuchuser/x",
])
def test_names_that_no_folder_can_have(shared, halted, capsys, command, name):
    with unchanged(shared):
        refused(capsys, *with_output(command_line(shared, command), name.format(p=shared)))


# ---------------------------------------------------------------------- links


@pytest.mark.parametrize("link", [
    "config.json", "mama", "mama/masks.safetensors", "checkpoint-1", ".progress", "anything",
])
def test_nothing_is_written_through_links_in_an_output_folder(place, halted, capsys, link):
    out = place / "out"
    (out / link).parent.mkdir(parents=True)
    os.symlink(place / "teacher", out / link)
    with unchanged(place):
        for command, overwrite in (("prune", ["--overwrite"]), ("sft", ["--overwrite", "true"])):
            assert "is a link" in refused(capsys, *command_line(place, command), *overwrite)
        assert "is a link" in refused(capsys, *command_line(place, "sft"), "--resume_from_checkpoint", "true")


def test_hard_links_count_and_links_within_do_not(tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-5").mkdir(parents=True)
    os.symlink("checkpoint-5", out / "latest")
    check_links(out)
    (tmp_path / "theirs.json").write_text("{}")
    os.link(tmp_path / "theirs.json", out / "config.json")
    with refusal("is a link"):
        check_links(out)


def test_what_stands_in_the_place_of_an_output_is_said_before_anything_is_measured(place, halted, capsys):
    places = {"prune": "config.json", "levels": "levels.csv", "ablation": "ablation.png", "sft": "README.md"}
    for command, name in places.items():
        (place / "out" / name).mkdir(parents=True)
        overwrite = ["--overwrite", "true"] if command == "sft" else ["--overwrite"]
        with unchanged(place):
            assert "is no file" in refused(capsys, *command_line(place, command), *overwrite)
        (place / "out" / name).rmdir()
    (place / "out" / "adapter_config.json").write_text("{}")
    assert "adapter" in refused(capsys, *command_line(place, "prune"), "--overwrite")


def test_no_file_takes_the_place_of_a_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with refusal("is no file"):
        write_text(tmp_path / "pipe", "x")
    assert not (tmp_path / "pipe").is_file() and (tmp_path / "pipe").exists()


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "theirs").write_text("kept")
    os.symlink(tmp_path / "theirs", tmp_path / "ours.json")
    write_json(tmp_path / "ours.json", {"a": 1})
    assert (tmp_path / "theirs").read_text() == "kept" and not (tmp_path / "ours.json").is_symlink()


# ---------------------------------------------------------------------- files that are whole


def test_a_folder_is_written_whole_or_stays_as_it_was(tmp_path):
    out = tmp_path / "out"
    write_folder(out, lambda folder: (folder / "model.safetensors").write_text("old"), remove_model_files)

    def half(folder):
        (folder / "model.safetensors").write_text("half")
        raise OSError(28, "No space left on device")

    with unchanged(out), refusal("No space left"):
        write_folder(out, half, remove_model_files)
    (out / ".writing.tmp").mkdir()
    (out / ".writing.tmp" / "stale").write_text("of a killed run")
    os.symlink(tmp_path / "theirs", out / "config.json")
    (tmp_path / "theirs").write_text("kept")

    def whole(folder):
        (folder / "config.json").write_text("new")
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("new")

    write_folder(out, whole, remove_model_files)
    assert sorted(tree(out)) == ["config.json", "sub", "sub/x"] and (tmp_path / "theirs").read_text() == "kept"


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path, monkeypatch):
    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with unchanged(tmp_path), refusal("No space left"):
        write_text(tmp_path / "a.txt", "new")


def test_models_are_replaced_by_name_and_nothing_else_is_deleted(tmp_path):
    ours = ["model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin",
            "mama/masks.safetensors", "mama/statistics-00000-of-00002.safetensors", "mama/state.json"]
    theirs = ["embeddings.safetensors", "model.safetensors.backup", "mama/notes.json", "data.bin", "my.index.json"]
    (tmp_path / "mama").mkdir()
    for name in (*ours, *theirs):
        (tmp_path / name).write_text("x")
    remove_model_files(tmp_path)
    assert [name for name in tree(tmp_path) if name != "mama"] == sorted(theirs)


# ---------------------------------------------------------------------- what the machine refuses


@pytest.mark.parametrize("error, said", [
    (OSError(28, "No space left on device", "/x/y"), "disk is full"), (OSError(27, "File too large"), "disk is full"),
    (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk is full"),
    (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"), "disk is full"),
    (RuntimeError("PytorchStreamWriter failed writing file data/1: file write failed"), "disk is full"),
    (FileNotFoundError(2, "No such file", "/x/out"), "is gone"), (PermissionError(13, "Permission denied", "/x"), "/x"),
    (MemoryError(), "memory"),
    (FileNotFoundError(2, "No such file or directory"), "the system refuses"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "memory"),
])
def test_what_the_machine_refuses_is_one_sentence(error, said, capsys, monkeypatch):
    assert said in refusal_of(error)
    monkeypatch.setattr("mama_trl.cli.dispatch", lambda argv: (_ for _ in ()).throw(error))
    assert said in refused(capsys, "sft")


def test_other_errors_stay_what_they_are(monkeypatch):
    assert refusal_of(ZeroDivisionError()) is None
    monkeypatch.setattr("mama_trl.cli.dispatch", lambda argv: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["sft"])


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 150 kB; skipped where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=150k", "tmpfs", folder]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("free", [0, 40, 90])
@pytest.mark.parametrize("command", ["prune", "sft", "evaluate", "levels"])
def test_a_full_disk_is_one_sentence_and_nothing_is_half_written(shared, small_disk, capsys, command, free):
    filler = small_disk / "filler"
    disk = os.statvfs(small_disk)
    filler.write_bytes(bytes(disk.f_bavail * disk.f_frsize - 1024 * free))
    out = small_disk / ("out.json" if command == "evaluate" else "out")
    argv = [*with_output(command_line(shared, command), out)]
    argv += {"sft": ["--save_steps", "1", "--max_length", "16"], "levels": ["--methods", "magnitude"]}.get(command, [])
    code = main(argv)
    said = capsys.readouterr().err
    assert code in (0, 2) and (code == 2 or free) and "Traceback" not in said and said.count("mama: ") == (code == 2)
    if code == 2 and command != "sft":  # what a training run saved before stays, to be resumed
        left = {path.name for path in out.rglob("*") if path.is_file()} if out.is_dir() else set()
        assert not out.is_file() and not left & {"model.safetensors", "config.json", "masks.safetensors"}
        filler.unlink()
        (small_disk / "out").is_dir() and subprocess.run(["mount", "-o", "remount,size=9m", small_disk], check=True)
        assert main([*argv, "--overwrite"] if command == "levels" else argv) == 0


# ---------------------------------------------------------------------- one run at a time


def test_a_second_run_is_refused_and_the_folder_is_left_as_it_was(place, halted, capsys):
    out = place / "out"
    with locked(out):
        assert (out / LOCK).is_file()
        for command in WITH_FOLDER:
            assert "another run is writing" in refused(capsys, *command_line(place, command))
    assert not out.exists()


def test_a_lock_ends_with_its_process(tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, sys, time\nfrom mama_trl.disk.lock import locked\n"
        "with locked(sys.argv[1]):\n    if not os.fork():\n        print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        child = int(process.stdout.readline())
        with refusal("another run"), locked(out):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(out):  # though its child, as a data loader's worker, may still live, and its file is still there
            assert (out / LOCK).exists()
        os.kill(child, signal.SIGKILL)
    assert not (out / LOCK).exists()


def test_where_there_are_no_locks_a_run_goes_on(tmp_path, monkeypatch, caplog):
    import fcntl

    monkeypatch.setattr(fcntl, "flock", lambda *a: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    with locked(tmp_path / "out"):
        assert "without locks" in caplog.text
        (tmp_path / "out" / "x").write_text("")
    assert tree(tmp_path / "out").keys() == {"x"}


def test_a_refusal_within_the_lock_leaves_nothing(tmp_path):
    with pytest.raises(MamaError), unchanged(tmp_path), locked(tmp_path / "a" / "b"):
        raise MamaError("the data makes no sense")
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "x").write_text("kept")
    assert sorted(tree(tmp_path)) == ["a", "a/b", "a/b/x"]


def test_outputs_are_checked_with_every_kind_of_name(tmp_path):
    (tmp_path / "file").write_text("")
    for bad in ("", " ", tmp_path / "file", tmp_path / "file" / "sub", tmp_path / ("x" * 300), "y" * 5000):
        with refusal("."):
            check_output_dir(bad)
    for bad in ("", tmp_path, tmp_path / "none" / "x", "y" * 5000):
        with refusal("."):
            check_output_file(bad)
    check_output_file(None)
    assert check_output_dir(tmp_path / "new") == tmp_path / "new" and time.time() > 0
