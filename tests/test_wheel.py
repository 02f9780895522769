"""The built wheel, installed into an empty environment outside of the checkout, does all that the checkout does."""

import email
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import moe_hf
from tests.documents.blocks import ROOT, blocks_of
from tests.documents.commands import commands_of
from tests.documents.stand_ins import LINKS, rows, write_folders


SHORT = re.compile(r"max_steps=\d+")
QUICK = ("--dataset", "my_texts", "--block_size", "32", "--max_steps", "2", "--disable_tqdm", "true")


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

    def run(program: str, *arguments, home: Path = home) -> str:
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


def test_metadata_pins_no_build_and_names_the_extras(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    for requirement in requirements:
        assert requirement.url is None, requirement
        for specifier in requirement.specifier:
            # A range leaves the choice to the index that a machine has: for CUDA, ROCm or a CPU.
            assert specifier.operator in (">=", "<") and Version(specifier.version).local is None, requirement
    assert {"docs", "gguf", "notebook", "trl"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata["Version"] == moe_hf.__version__


def test_wheel_runs_every_command_outside_of_the_checkout(installed, tmp_path):
    """What the README shows first, as it is printed: folders have the names of models, and training is short."""
    write_folders(tmp_path)
    for name in LINKS:
        (tmp_path / name).unlink()
    assert str(ROOT) not in installed("python", "-c", "import moe_hf; print(moe_hf.__file__)")
    python = next(block for block in blocks_of(ROOT / "README.md") if block.language == "python")
    rows().save_to_disk(tmp_path / "rows")
    (tmp_path / "ten_lines.py").write_text(
        "import datasets\nmy_tokenised_blocks = datasets.load_from_disk('rows')\n"
        + SHORT.sub("max_steps=2", python.text)
    )
    installed("python", "ten_lines.py", home=tmp_path)
    for command, options in (("upcycle", ()), ("finetune", QUICK), ("report", ())):
        words = next(
            words for words in readme_commands() if words[:2] == ["moe-hf", command] and "--dry-run" not in words
        )
        installed(*words, *options, home=tmp_path)
    assert (tmp_path / "my-moe" / "README.md").is_file()
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
    assert (tmp_path / "report" / "report.html").is_file()


def readme_commands() -> list[list[str]]:
    """Of all blocks of shell of the README, in order."""
    blocks = [block for block in blocks_of(ROOT / "README.md") if block.language == "bash"]
    return [words for block in blocks for words in commands_of(block.text)]
