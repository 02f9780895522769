"""The sources of an upcycling on disk as folders with ordinary checkpoints: fetched, converted, or as they are."""

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from moe_hf.conversion import convert_source, is_conversion_of, refuse_full_disk
from moe_hf.dense_sources import needs_conversion
from moe_hf.errors import MoEError
from moe_hf.gguf_files import gguf_file_of
from moe_hf.planning import plan_upcycling
from moe_hf.unwrapping import path_of
from moe_hf.upcycling.on_disk.partial_folder import CONVERTED_NAME, PartialFolder
from moe_hf.weight_files import weight_files


HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja"]


class SourceFolders:
    """Gives each source as a folder with an ordinary checkpoint; what is none is converted in the partial folder.

    A conversion that an interrupted process finished is taken as it is. Before the first one, the arguments of the upcycling
    and the room on the disk are checked.

    Args:
        partial (`PartialFolder`): of the destination.
        source (`str` or `os.PathLike`): the first source.
        arguments (`Mapping`): of the upcycling.

    Attributes:
        given (`list[Path]`): the sources on this machine, in the order in which they were asked for.
        folders (`list[Path]`): where their checkpoints are.
    """

    def __init__(self, partial: PartialFolder, source: str | os.PathLike, arguments: Mapping[str, Any]):
        self.partial, self.source, self.arguments = partial, source, arguments
        self.given: list[Path] = []
        self.folders: list[Path] = []

    def folder(self, source: str | os.PathLike) -> Path:
        """The folder of the next source.

        Raises:
            MoEError: it is no dense model, or cannot be converted.
        """
        given = on_this_machine(source)
        self.given.append(given)
        self.folders.append(self._converted(given) if needs_conversion(given) else given)
        return self.folders[-1]

    def _converted(self, given: Path) -> Path:
        folder = self.partial.path / f"{CONVERTED_NAME}{len(self.folders)}"
        if is_conversion_of(folder, given):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
        if not self.folders:
            known = {
                name: value for name, value in self.arguments.items() if name not in ("config_fields", "allow_inexact")
            }
            plan = plan_upcycling(self.source, **known, **self.arguments["config_fields"])
            refuse_full_disk(self.partial.destination, plan.dense_bytes + plan.moe_bytes)
        convert_source(given, folder)
        return folder


def on_this_machine(source: str | os.PathLike) -> Path:
    """The folder or the GGUF file that a source is; what a Hub id names is fetched.

    Raises:
        MoEError: it is a path where nothing is.
    """
    path = Path(path_of(source, "upcycle(model) takes a model in memory")).expanduser()
    if gguf_file_of(path) is not None or path.is_dir():
        return path
    if isinstance(source, Path) or str(source).startswith((".", "/", "~")):
        raise MoEError(
            f"{source} is not a folder; give a folder that save_pretrained wrote, a GGUF file, or a Hub id."
        )
    return Path(snapshot_download(str(source), allow_patterns=HUB_FILES))


def fingerprint_of(path: Path) -> dict[str, Any]:
    """Size, time of change and sha256 of the head of each file that the weights come from."""
    file = gguf_file_of(path)
    files = [file] if file is not None else [path / "config.json", *weight_files(path)]
    fingerprint = {}
    for one in files:
        with open(one, "rb") as opened:
            # Of a safetensors file the header.
            length = min(int.from_bytes(opened.read(8), "little"), 1 << 27) if file is None else 1 << 20
            digest = hashlib.sha256(opened.read(length)).hexdigest()
        status = one.stat()
        fingerprint[one.name] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "header_sha256": digest}
    return fingerprint
