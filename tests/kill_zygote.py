"""Runs `mama` commands in children of one process that has imported everything, and kills them (SIGKILL) when asked to.

Reads one JSON request a line: `argv`, `log` (where the command's output goes), and at most one of `after` (seconds
until the kill) and `at` (the number of the event in `folder` before which the process is killed). Answers with one JSON
line: the exit status and how many events there were.

Events are what Python tells of files in `folder`: opened for writing, renamed, removed, folders made and removed; and
the files that `torch.save` and safetensors write, before and when their first half is there.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")


class Killer:
    """Counts events in a folder, and kills this process before the one that was asked for."""

    def __init__(self, folder: str, at: int, count_file: str):
        self.folder, self.at, self.count, self.count_file = os.path.realpath(folder), at, 0, count_file

    def event(self, path, half: bool = False) -> None:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return
        path = os.path.realpath(os.fsdecode(path))
        if path != self.folder and not path.startswith(self.folder + os.sep):
            return
        self.count += 1
        if self.count == self.at:
            if half and os.path.isfile(path):
                with open(os.open(path, os.O_WRONLY), "wb") as file:
                    os.ftruncate(file.fileno(), os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, name, arguments) -> None:
        if name == "open" and arguments[1] is not None and set(str(arguments[1])) & set("wax+"):
            self.event(arguments[0])
        elif name in ("os.rename", "os.remove", "os.mkdir", "os.rmdir"):
            self.event(arguments[0])

    def watch(self) -> None:
        sys.addaudithook(self.audit)
        import safetensors.torch
        import torch

        def watched(write, position):
            def wrapper(*args, **kwargs):
                path = args[position] if len(args) > position else kwargs.get("filename")
                self.event(path)
                result = write(*args, **kwargs)
                self.event(path, half=True)
                return result

            return wrapper

        torch.save = watched(torch.save, 1)
        safe = watched(safetensors.torch.save_file, 1)
        for module in list(sys.modules.values()):
            for name in ("save_file", "safe_save_file"):
                if getattr(module, name, None) is safetensors.torch.save_file:
                    setattr(module, name, safe)

    def close(self) -> None:
        Path(self.count_file).write_text(str(self.count))


def child(request: dict, count_file: str) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    from mama_trl.cli import main

    killer = None
    if "folder" in request:
        killer = Killer(request["folder"], request.get("at", 0), count_file)
        killer.watch()
    try:
        code = main(request["argv"])
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    if killer is not None:
        killer.close()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve() -> None:
    import datasets  # noqa: F401
    import trl  # noqa: F401

    import mama_trl.demo.pipeline  # noqa: F401
    import mama_trl.scripts.prune  # noqa: F401
    import mama_trl.scripts.run  # noqa: F401
    import mama_trl.scripts.sft  # noqa: F401
    import mama_trl.training.distillation.trainer  # noqa: F401
    import mama_trl.training.grpo.trainer  # noqa: F401

    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        count_file = request["log"] + ".count"
        Path(count_file).unlink(missing_ok=True)
        began = time.time()
        process = os.fork()
        if process == 0:
            child(request, count_file)
        status = None
        while status is None:
            if "after" in request and time.time() - began > request["after"]:
                try:
                    os.kill(process, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            finished, code = os.waitpid(process, os.WNOHANG)
            status = os.waitstatus_to_exitcode(code) if finished else time.sleep(0.01)
        events = int(Path(count_file).read_text()) if Path(count_file).exists() else None
        answer = {"status": status, "events": events, "seconds": time.time() - began}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
