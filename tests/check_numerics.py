"""`make numerics`: the tests that compare computed values, once under each set of kernels that this machine can run."""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


ROOT = Path(__file__).resolve().parents[1]
PRELOADED = Path(__file__).with_name("misaligned_memory.c")
# Kernels of torch itself, of oneDNN and of MKL are chosen apart; the tests' models run on all three.
SSE = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
AVX512 = {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_ENABLE_INSTRUCTIONS": "AVX512"}


@dataclass(frozen=True)
class Machine:
    """What the tests run under: kernels, threads, where tensors lie, and how much else is running."""

    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    misaligned: bool = False
    busy: bool = False


MACHINES = {
    "sse": Machine(SSE),
    "avx2": Machine(AVX2, needs="AVX2"),
    "avx512": Machine(AVX512, needs="AVX512"),
    "2-threads": Machine({"OMP_NUM_THREADS": "2"}),
    "busy": Machine(busy=True),
    # Those of MKL for old processors are the ones that sum by where a row starts.
    "misaligned": Machine(SSE, misaligned=True),
}


def obstacle(machine: Machine) -> str | None:
    """Why this machine cannot be that one."""
    capability = torch.backends.cpu.get_cpu_capability()
    if machine.needs and not (capability == machine.needs or capability.startswith("AVX512")):
        return f"the processor has {capability}"
    if machine.misaligned and (shutil.which("cc") is None or platform.libc_ver()[0] != "glibc"):
        return "needs a C compiler, cc, and glibc"
    return None


@contextmanager
def running(machine: Machine) -> Iterator[dict[str, str]]:
    """The environment of a run; while it lasts two processes per core keep a busy machine busy."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | machine.environment
    loads = []
    with tempfile.TemporaryDirectory(prefix="check-numerics-") as folder:
        if machine.misaligned:
            library = Path(folder) / "misaligned_memory.so"
            subprocess.run(["cc", "-O2", "-shared", "-fPIC", PRELOADED, "-o", library, "-ldl"], check=True)
            environment["LD_PRELOAD"] = str(library)
        try:
            if machine.busy:
                spin = [sys.executable, "-c", "while True: pass"]
                loads = [subprocess.Popen(spin) for _ in range(2 * (os.cpu_count() or 1))]
            yield environment
        finally:
            for load in loads:
                load.kill()
                load.wait()


def main(arguments: list[str] | None = None) -> int:
    """Run the tests marked `numerics` on every machine, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", choices=MACHINES, help=f"one of {', '.join(MACHINES)}")
    parser.add_argument("--tests", default="tests", metavar="PATH", help="the tests of this file or folder")
    given = parser.parse_args(arguments)
    table, failed = Table(title="Tests marked numerics"), False
    for header in ("machine", "seconds", "result"):
        table.add_column(header)
    for name in [given.only] if given.only else MACHINES:
        reason = obstacle(MACHINES[name])
        if reason is not None:
            table.add_row(name, "", f"not run: {reason}")
            continue
        print(f"== {name}", flush=True)
        with running(MACHINES[name]) as environment:
            command = [sys.executable, "-m", "pytest", "-q", "-m", "numerics and not slow and not gpu", given.tests]
            start = time.monotonic()
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
            last = ""
            for line in process.stdout:
                print(line, end="", flush=True)
                last = line
            failed |= process.wait() != 0
        table.add_row(name, f"{time.monotonic() - start:.0f}", re.sub(r" in [\d.]+s.*", "", last.strip("= \n")))
    Console().print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
