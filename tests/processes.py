"""Several gloo processes that run a list of cases: one launch, since most of its time is imports; one result per case."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist


ROOT = Path(__file__).parents[1]
RESULTS = "results.pt"
# After which a program hangs: ten times what the slowest takes, since the machine may be busy.
PATIENCE_SECONDS = 800


@dataclass
class CaseResult:
    """What a case returned in the first process, or the traceback of the first process that failed."""

    value: Any = None
    error: str | None = None


def launch(command: list[str], timeout: int = PATIENCE_SECONDS, backend: str = "gloo") -> str:
    """Run a command that starts processes: on the CPU, where no GPU is seen, or with `backend="nccl"` one per GPU."""
    python_path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": python_path, "PYTHONFAULTHANDLER": "1"}
    if backend == "gloo":
        # Without the first accelerate takes the processes for one or for none.
        environment |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            output, errors = _aborted(process)
            pytest.fail(f"It took more than {timeout} s.\n{output[-2000:]}\n{errors[-20000:]}", pytrace=False)
    assert process.returncode == 0, output[-2000:] + _what_failed(errors)
    return output


def _what_failed(errors: str) -> str:
    """The ends of what processes wrote on the way to their failure, without what a crash lists of loaded libraries."""
    errors = re.sub(r"^Extension modules: .*$", "", errors, flags=re.MULTILINE)
    crash = errors.find("Fatal Python error")
    return errors[-6000:] if crash < 0 else errors[max(0, crash - 3000) : crash + 5000] + "\n[...]\n" + errors[-1500:]


def _aborted(process: subprocess.Popen) -> tuple[str, str]:
    """End a program and the processes that it started, which would go on without it; each says where it stood."""
    started = psutil.Process(process.pid).children(recursive=True)
    for one in [*started, process]:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGABRT)
    try:
        return process.communicate(timeout=20)
    finally:
        for one in [*started, process]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def shared_folder(factory: pytest.TempPathFactory, name: str) -> Path:
    """A folder of this test run, the same one in all workers of xdist: what one has started, another need not start."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    folder.mkdir(exist_ok=True)
    return folder


def launch_once(command: list[str], result: Path, timeout: int = PATIENCE_SECONDS, backend: str = "gloo") -> None:
    """`launch`, unless a worker has done it: `result` is then there. One that is at it is waited for."""
    with open(result.parent / f"{result.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            launch(command, timeout, backend)


def torchrun(module: str, *arguments: str, processes: int = 2) -> list[str]:
    """The command that starts `python -m module` in several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--master_port=0"]
    return [*command, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "-m", module, *arguments]


class Cases:
    """The results of the cases of `module`, which `run_cases` ran in several processes when the first was asked for."""

    def __init__(
        self,
        module: str,
        folder: Path,
        processes: int = 2,
        arguments: Iterable[str] = (),
        timeout: int = PATIENCE_SECONDS,
        backend: str = "gloo",
    ):
        self._command = torchrun(module, str(folder), *arguments, processes=processes)
        self._file, self._processes, self._timeout = folder / RESULTS, processes, timeout
        self._backend = backend
        self._results: dict[str, CaseResult] | None = None
        self._failure: str | None = None

    def __getitem__(self, name: str) -> Any:
        """What the case returned; its failure is this test's."""
        if self._failure is not None:
            pytest.fail(self._failure, pytrace=False)
        if self._results is None:
            self._failure = "the launch of the first case failed"
            launch_once(self._command, self._file, self._timeout, self._backend)
            loaded = torch.load(self._file, weights_only=False)
            assert (loaded["world_size"], loaded["backend"]) == (self._processes, self._backend)
            self._results, self._failure = loaded["cases"], None
        result = self._results[name]
        if result.error is not None:
            pytest.fail(f"{name}:\n{result.error}", pytrace=False)
        return result.value


def run_cases(cases: dict[str, Callable[[Path], Any]], folder: Path) -> None:
    """Run each case in a folder of its own, in all processes; the first one writes the results."""
    if not dist.is_initialized():
        # A case that fails in one process only leaves the others waiting.
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE_SECONDS / 4))
    results: dict[str, CaseResult] = {}
    for name, case in cases.items():
        value, error = None, None
        if dist.get_rank() == 0:
            # What a run that is cut off was doing.
            print(f"case {name}", file=sys.stderr, flush=True)
        try:
            torch.manual_seed(0)
            value = case(folder / name)
        except BaseException:
            error = traceback.format_exc()
        errors: list[str | None] = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(errors, error)
        except RuntimeError:
            raise RuntimeError(f"{name} left the processes apart; this one's error: {error}") from None
        results[name] = CaseResult(value, next(filter(None, errors), None))
    if dist.get_rank() == 0:
        found = {"world_size": dist.get_world_size(), "backend": dist.get_backend(), "cases": results}
        torch.save(found, folder / RESULTS)
    dist.barrier()
    dist.destroy_process_group()
