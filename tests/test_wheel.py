"""The built wheel, installed into an empty environment outside of the checkout, does all that the checkout does."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.tiny_models import tiny_dense


ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built without a network by the build backend that is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True, text=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Run a program of a fresh environment that has the wheel, and the requirements of this one but not the checkout."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home / "env", with_pip=False)
    packages = home / "env" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # Links instead of a .pth line: the running environment's own .pth files may lead to the checkout.
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.suffix != ".pth" and not entry.name.startswith(("moe_hf", "_editable")):
            (packages / entry.name).symlink_to(entry)
    python = home / "env" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(install, check=True, cwd=home)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}

    def run(program: str, *arguments) -> str:
        command = [str(python.parent / program), *map(str, arguments)]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    return run


def test_wheel_holds_programs_recipes_and_card_template(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, target in (("training", "moe_hf/training"), ("model_cards", "moe_hf/model_cards")):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {f"{target}/{path.relative_to(ROOT / folder).as_posix()}" for path in files} <= names
    assert not any(name.startswith(("tests/", "examples/", "training/")) or "__pycache__" in name for name in names)


def test_wheel_runs_every_command_outside_of_the_checkout(installed, tmp_path):
    tiny_dense("llama").save_pretrained(tmp_path / "dense")
    assert str(ROOT) not in installed("python", "-c", "import moe_hf; print(moe_hf.__file__)")
    assert "upcycle" in installed("moe-hf", "--help")
    installed("moe-hf", "upcycle", tmp_path / "dense", tmp_path / "moe", "--num-experts", 2)
    assert (tmp_path / "moe" / "README.md").is_file()
    assert installed("moe-hf", "verify", tmp_path / "dense", tmp_path / "moe").startswith("equal")
    assert "routed experts" in installed("moe-hf", "inspect", tmp_path / "moe")


def test_wheel_finds_recipes_and_runs_the_fine_tuning_program(installed, tmp_path):
    assert "--config" in installed("python", "-m", "moe_hf.training.finetune", "--help")
    code = "from moe_hf.resources import resource_path; print(resource_path('training/recipes/finetune_moe.yaml'))"
    assert str(ROOT) not in installed("python", "-c", code)
