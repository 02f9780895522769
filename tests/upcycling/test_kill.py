"""Laws of an interrupted `upcycle_checkpoint`: the destination is whole or absent, and the same call continues."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moe_hf.errors import MoEError
from moe_hf.saving import verify_manifest
from moe_hf.streaming import upcycle_checkpoint
from moe_hf.upcycling.on_disk.partial_folder import STATE_NAME
from tests.tiny_models import tiny_dense
from tests.upcycling.interrupted import ARGUMENTS, contents, run


IN_A_NAMESPACE = ["unshare", "--map-root-user", "--mount"]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "dense"
    tiny_dense("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("expected") / "moe"
    run(source, output)
    return contents(output)


class Interrupt(BaseException):
    """Stands for Ctrl-C."""


def _interrupt(source: Path, output: Path, share: float = 0.5, **arguments) -> Path:
    """Stop a run when `share` of its bytes are written; returns what it left."""

    def stop(done: int, total: int) -> None:
        if done > share * total:
            raise Interrupt

    with pytest.raises(Interrupt):
        upcycle_checkpoint(source, output, progress=stop, **ARGUMENTS | arguments)
    assert not output.exists()
    return output.with_name(f".{output.name}.partial")


def _assert_published(output: Path, expected: dict[str, bytes]) -> None:
    assert contents(output) == expected
    verify_manifest(output)
    assert not output.with_name(f".{output.name}.partial").exists()


def test_a_killed_run_leaves_nothing_or_all_and_the_next_one_continues(source, tmp_path):
    program = [sys.executable, "-m", "tests.upcycling.interrupted", str(source), str(tmp_path)]
    result = subprocess.run(program, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert len(found) > 25 and all(entry["killed"] for entry in found)
    assert {"pwrite", "fsync", "replace"} <= {entry["name"] for entry in found}
    assert [entry for entry in found if not entry["equal"] or not entry["kept"]] == []
    assert [entry for entry in found if entry["refused"] != entry["published"]] == []
    # Some were killed before the first file was finished, some in the middle, some after the folder was published.
    assert {entry["published"] for entry in found} == {True, False}
    finished = {entry["finished"] for entry in found if not entry["published"]}
    # Files are written by several threads: how many are finished between two steps is not settled.
    assert min(finished) == 0 < max(finished)


def test_a_run_with_other_arguments_refuses_to_continue_and_restart_throws_away(source, expected, tmp_path):
    output = tmp_path / "moe"
    partial = _interrupt(source, output, seed=1)
    left = contents(partial)
    with pytest.raises(MoEError, match=r"differs in config.upcycling.seed: .*restart=True"):
        run(source, output)
    assert contents(partial) == left
    run(source, output, restart=True)
    _assert_published(output, expected)


def test_an_interrupted_run_of_another_source_is_not_continued(source, tmp_path):
    output = tmp_path / "moe"
    other = shutil.copytree(source, tmp_path / "other", copy_function=shutil.copyfile)
    _interrupt(source, output)
    with pytest.raises(MoEError, match=r"differs in config.upcycling.source, sources"):
        run(other, output)


def test_a_finished_file_that_was_damaged_is_written_again(source, expected, tmp_path):
    output = tmp_path / "moe"
    partial = _interrupt(source, output, share=0.7)
    names = json.loads((partial / "state.json").read_text())["finished"]
    damaged = partial / "folder" / sorted(names)[0]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    run(source, output)
    _assert_published(output, expected)


def test_a_state_that_cannot_be_read_is_started_again(source, expected, tmp_path):
    output = tmp_path / "moe"
    (_interrupt(source, output) / "state.json").write_text("{")
    run(source, output)
    _assert_published(output, expected)


def test_two_runs_into_one_folder_tell_the_second_who_writes(source, expected, tmp_path):
    output, said = tmp_path / "moe", []

    def second(done: int, total: int) -> None:
        if not said:
            with pytest.raises(MoEError) as refusal:
                run(source, output, restart=True)
            said.append(str(refusal.value))

    upcycle_checkpoint(source, output, progress=second, **ARGUMENTS)
    assert f"is being written by process {os.getpid()} on" in said[0]
    _assert_published(output, expected)


def test_a_source_that_changes_meanwhile_gives_nothing(source, expected, tmp_path):
    changing = shutil.copytree(source, tmp_path / "dense")

    def change(done: int, total: int) -> None:
        if done == total:
            with open(changing / "model.safetensors", "r+b") as file:
                file.seek(-4, os.SEEK_END)
                file.write(b"1234")

    with pytest.raises(MoEError, match="changed while it was read: nothing was published"):
        upcycle_checkpoint(changing, tmp_path / "moe", progress=change, **ARGUMENTS)
    assert [entry.name for entry in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize("name", [".", "moe", "deep/moe", "../dense"])
def test_a_destination_in_the_source_is_refused(source, name):
    before = contents(source)
    with pytest.raises(MoEError, match="is in the source"):
        run(source, source / name)
    assert contents(source) == before


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_a_destination_that_exists_is_refused(source, tmp_path, kind):
    output = tmp_path / "moe"
    {"folder": output.mkdir, "file": output.touch, "broken link": lambda: output.symlink_to("nowhere")}[kind]()
    with pytest.raises(MoEError, match="exists: nothing was written"):
        run(source, output)
    assert [entry.name for entry in tmp_path.iterdir()] == ["moe"]


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(MoEError, match=r"needs 0.00 GB more, .* nothing was written"):
        run(source, tmp_path / "moe")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_is_finished(source, expected, tmp_path, monkeypatch):
    output, pwrite, calls = tmp_path / "moe", os.pwrite, []

    def full(*args):
        calls.append(args)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(MoEError, match=r"could not be written: No space left on device.*the same call continues"):
        run(source, output)
    assert not output.exists() and STATE_NAME in os.listdir(tmp_path / ".moe.partial")
    monkeypatch.undo()
    run(source, output)
    _assert_published(output, expected)


FULL_DISK = """
import os, sys
from pathlib import Path
from moe_hf.errors import MoEError
from moe_hf.streaming import upcycle_checkpoint
from tests.upcycling.interrupted import ARGUMENTS, contents, run
source, disk = Path(sys.argv[1]), Path(sys.argv[2])
def fill(done, total):
    if done > total // 2 and not (disk / "filler").exists():
        (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
try:
    upcycle_checkpoint(source, disk / "moe", progress=fill, **ARGUMENTS)
except MoEError as error:
    print("SAID", error)
assert not (disk / "moe").exists()
(disk / "filler").unlink()
run(source, disk / "moe")
run(source, Path(sys.argv[3]))
print("EQUAL", contents(disk / "moe") == contents(Path(sys.argv[3])))
try:
    run(source, Path("/sys/moe"))
except MoEError as error:
    print("READ-ONLY", error)
"""


def _skip_without_mounts() -> None:
    command = [*IN_A_NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no unshare: {error}")
    if result.returncode:
        pytest.skip(f"a disk cannot be mounted here: {result.stderr.strip()}")


def test_a_real_disk_that_fills_up_and_one_that_is_read_only(source, tmp_path):
    _skip_without_mounts()
    disk = tmp_path / "disk"
    disk.mkdir()
    mounts = f'mount -t tmpfs -o size=3m none {disk} && mount -t tmpfs -o ro none /sys && exec "$@"'
    python = [sys.executable, "-c", FULL_DISK, str(source), str(disk), str(tmp_path / "whole")]
    result = subprocess.run([*IN_A_NAMESPACE, "sh", "-c", mounts, "sh", *python], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "No space left on device" in result.stdout and "the same call continues there" in result.stdout
    assert "EQUAL True" in result.stdout
    assert "READ-ONLY /sys/.moe.partial cannot be written: Read-only file system." in result.stdout


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder; the read-only disk is tested above")
def test_a_folder_that_may_not_be_written_is_one_clear_error(source, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(MoEError, match="cannot be written: Permission denied"):
        run(source, tmp_path / "locked" / "moe")
