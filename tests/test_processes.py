"""What several test workers need is started once; what hangs says where, and is ended with all that it started."""

import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from tests.processes import PATIENCE_SECONDS, ROOT, launch, shared_folder


PROGRAM = """
import sys
from pathlib import Path
from tests.processes import launch_once
result = Path(sys.argv[1])
write = f"import time; time.sleep(0.3); open({str(result)!r}, 'a').write('once')"
launch_once([sys.executable, "-c", write], result)
assert result.read_text() == "once"
"""


def test_workers_that_come_at_the_same_time_start_one_launch(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "result")]
    workers = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [worker.wait(timeout=PATIENCE_SECONDS) for worker in workers] == [0, 0]
    assert (tmp_path / "result").read_text() == "once"


def test_workers_of_one_run_share_a_folder_and_a_run_alone_has_its_own(tmp_path, monkeypatch):
    (tmp_path / "gw0").mkdir()
    factory = SimpleNamespace(getbasetemp=lambda: tmp_path / "gw0")
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    assert shared_folder(factory, "a").parent == tmp_path
    monkeypatch.delenv("PYTEST_XDIST_WORKER")
    assert shared_folder(factory, "a").parent == tmp_path / "gw0"


HANGS = """
import subprocess, time
def waits():
    time.sleep(600)
print(subprocess.Popen(["sleep", "600"], start_new_session=True).pid, flush=True)  # says nothing in between
waits()
"""


def test_program_that_hangs_says_where_and_is_ended_with_its_children():
    with pytest.raises(pytest.fail.Exception, match="in waits") as failure:
        launch([sys.executable, "-c", HANGS], timeout=5)
    child = int(str(failure.value).splitlines()[1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
