"""Kills `upcycle_checkpoint` at its steps: `python -m tests.upcycling.interrupted SOURCE FOLDER` prints what was left.

A step is a call that changes the disk. Each run is a forked child that kills itself before the step with a given number,
so that transformers is imported once only; then the same call is made again, undisturbed.
"""

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

from moe_hf.errors import MoEError
from moe_hf.saving import verify_manifest
from moe_hf.streaming import upcycle_checkpoint


STEPS = ("pwrite", "fsync", "replace", "mkdir", "unlink", "rmdir")
ARGUMENTS = {"num_experts": 3, "noise": 0.1, "max_shard_size": "200KB", "verify": False}


def run(source: Path, output: Path, **arguments) -> None:
    """One conversion into files of different kinds: noisy experts are written, the rest is copied."""
    upcycle_checkpoint(source, output, progress=lambda done, total: None, **ARGUMENTS | arguments)


class Steps:
    """Counts the calls that change the disk, and kills the process before one of them."""

    def __init__(self, last: int | None):
        self.last, self.names, self.lock = last, [], threading.Lock()
        for name in STEPS:
            setattr(os, name, self.counted(name, getattr(os, name)))

    def counted(self, name: str, function):
        """`function`, counted."""

        def call(*args, **kwargs):
            with self.lock:
                if len(self.names) == self.last:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.names.append(name)
            return function(*args, **kwargs)

        return call


def forked(source: Path, output: Path, last: int | None, report: Path) -> int:
    """Run in a child that is killed before step number `last`; returns the child's status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        signal.alarm(120)
        steps = Steps(last)
        run(source, output)
        names = list(steps.names)
        report.write_text(json.dumps(names))
        status = 0
    finally:
        os._exit(status)


def contents(folder: Path) -> dict[str, bytes]:
    """Files of a folder by name."""
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def finished_files(output: Path) -> dict[str, list[int]]:
    """Inode and time of change of each weight file that an interrupted run has finished."""
    partial = output.with_name(f".{output.name}.partial")
    state = partial / "state.json"
    names = json.loads(state.read_text())["finished"] if state.exists() else {}
    files = {name: partial / "folder" / name for name in names}
    # Gone when the folder was published, and the rest of the partial one not yet removed.
    return {name: _stamp(file) for name, file in files.items() if file.exists()}


def _stamp(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_ino, status.st_mtime_ns]


def main(source: Path, folder: Path) -> None:
    """Kill and repeat at many steps, and print a JSON list of what was found after each."""
    report = folder / "steps.json"
    assert forked(source, folder / "whole", None, report) == 0
    names, expected = json.loads(report.read_text()), contents(folder / "whole")
    # All that end or begin a file, and some of the many in the middle of one.
    often = [index for index, name in enumerate(names) if name in ("fsync", "replace", "mkdir")]
    chosen = sorted({*often[:: max(1, len(often) // 20)], *range(0, len(names), len(names) // 16), len(names) - 1})
    found = []
    for step in chosen:
        output = folder / f"killed-{step}"
        status = forked(source, output, step, report)
        entry = {"step": step, "name": names[step], "killed": status == signal.SIGKILL, "published": output.exists()}
        finished = finished_files(output)
        if output.exists():
            verify_manifest(output)
        try:
            run(source, output)
            entry["refused"] = False
        except MoEError as error:
            entry["refused"] = "exists" in str(error)
        entry["equal"] = contents(output) == expected
        entry["finished"] = len(finished)
        entry["kept"] = all(_stamp(output / name) == stamp for name, stamp in finished.items())
        shutil.rmtree(output)
        shutil.rmtree(output.with_name(f".{output.name}.partial"), ignore_errors=True)
        found.append(entry)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
