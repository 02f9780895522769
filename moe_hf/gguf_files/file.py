"""GGUF files, the format of llama.cpp, as sources: what is in one, and the ordinary model of transformers that it becomes.

transformers reads the weights, the configuration and the tokenizer. What it leaves unread without a word is looked for here:
tensors, numbers of the architecture, the scaling of rotary frequencies, tokens that end an answer, templates, the split of text.
"""

import copy
import os
import re
import struct
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from moe_hf.errors import MoEError


if TYPE_CHECKING:
    from gguf import GGUFReader


INSTEAD = "Give the checkpoint that it was made from."
SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})$")
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# What reading a damaged file raises, in gguf and in numpy.
DAMAGE = (ValueError, LookupError, ArithmeticError, TypeError, OSError, MemoryError, RuntimeError, struct.error)


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file says of itself; no tensor is read.

    Attributes:
        path: of the file.
        architecture: as llama.cpp calls it.
        metadata: keys to plain values; of long arrays, such as the vocabulary, the length.
        shapes: of the tensors by name, in torch's order.
        types: of the tensors by name: how they are stored, such as `Q4_1` or `F32`.
        dtype: the narrowest dtype that holds each number of the file exactly.
    """

    path: Path
    architecture: str
    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]
    dtype: torch.dtype

    @property
    def quantized_as(self) -> str | None:
        """How the weights are stored, with the numbers of tensors, or None where all are floating-point numbers."""
        counts = Counter(self.types.values())
        if counts.keys() <= FLOATS.keys():
            return None
        return "GGUF, " + ", ".join(f"{kind} ({count} tensors)" for kind, count in counts.most_common())

    @property
    def num_parameters(self) -> int:
        """Numbers in all tensors."""
        return sum(map(prod, self.shapes.values()))

    @property
    def license(self) -> str | None:
        """As the file names it."""
        found = self.metadata.get("general.license")
        return found if isinstance(found, str) and found else None

    def number(self, key: str) -> Any:
        """The metadata of the architecture under a name such as `context_length`, or None."""
        return self.metadata.get(f"{self.architecture}.{key}")


def gguf_file_of(source: str | os.PathLike) -> Path | None:
    """The GGUF file that a source is: a file, or a folder that has one and no config.json. None for other sources.

    Raises:
        MoEError: a folder has several, or there is no file of that name.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = sorted(path.glob("*.gguf"))
        if not found or (path / "config.json").is_file():
            return None
        if len(found) > 1 and not all(SPLIT_NAME.search(file.stem) for file in found):
            raise MoEError(f"{path} holds several GGUF files: give one of {', '.join(file.name for file in found)}.")
        return found[0]
    if path.suffix.lower() == ".gguf" and not path.is_file():
        raise MoEError(f"{path} does not exist: give a GGUF file, or a folder with one.")
    return path if path.is_file() and (path.suffix.lower() == ".gguf" or _starts_like_gguf(path)) else None


def _starts_like_gguf(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def read_gguf(path: str | os.PathLike) -> GGUFFile:
    """Read what a GGUF file says of itself.

    Raises:
        MoEError: the package `gguf` is missing, the file is damaged or one part of several, or the model has experts.
    """
    path = Path(path).expanduser().resolve()
    try:
        status = path.stat()
    except OSError as error:
        raise MoEError(f"{path} cannot be read: {error.strerror}.") from error
    # Reading a large vocabulary takes seconds.
    return _read(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=8)
def _read(path: Path, size: int, changed: int) -> GGUFFile:
    reader = _reader(path)
    metadata = {key: _value(field) for key, field in reader.fields.items()}
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not reader.tensors:
        raise MoEError(f"{path} names no architecture or has no tensors: it is no model. {INSTEAD}")
    part = SPLIT_NAME.search(path.stem)
    if part is not None or (metadata.get("split.count") or 1) > 1:
        raise MoEError(
            f"{path} is one part of a model that was split into {metadata.get('split.count') or int(part[2])} files: put "
            "them together first with llama-gguf-split --merge FIRST-PART ONE-FILE.gguf, and give that file."
        )
    if metadata.get(f"{architecture}.expert_count"):
        raise MoEError(f"{path} has {metadata[f'{architecture}.expert_count']} experts already; give a dense model.")
    shapes = {tensor.name: tuple(int(size) for size in tensor.shape[::-1]) for tensor in reader.tensors}
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    return GGUFFile(path, architecture, metadata, shapes, types, _dtype_of(reader))


def _reader(path: Path) -> "GGUFReader":
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise MoEError(
            f"{path} is read with the package gguf, which is missing: pip install 'moe-hf[gguf]'."
        ) from error
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise MoEError(f"{path} is no GGUF file: it does not begin with the letters GGUF.")
    try:
        reader = GGUFReader(path)
        end = max((tensor.data_offset + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    except DAMAGE as error:
        raise MoEError(f"{path} is damaged or cut off ({_reason(error)}): fetch it again.") from error
    if end > path.stat().st_size:
        raise MoEError(f"{path} is cut off: it has {path.stat().st_size} of at least {end} bytes. Fetch it again.")
    return reader


def _value(field: Any) -> Any:
    """Plain values; of an array that is longer than a list of layers, its length."""
    return len(field.data) if len(field.data) > 1024 else field.contents()


def gguf_tensor(file: GGUFFile, name: str) -> torch.Tensor:
    """A tensor of a file that is stored as floating-point numbers."""
    data = next(tensor.data for tensor in _reader(file.path).tensors if tensor.name == name)
    return torch.from_numpy(data.copy())


def _dtype_of(reader: "GGUFReader") -> torch.dtype:
    """A vector is stored as F32 in any file, so it is looked at whether 16 bits hold its numbers."""
    kinds = {tensor.tensor_type.name for tensor in reader.tensors} - {"F32"}
    if len(kinds) != 1 or not kinds <= {"F16", "BF16"}:
        return torch.float32
    dtype = FLOATS[kinds.pop()]
    wide = (torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors if tensor.tensor_type.name == "F32")
    return dtype if all(torch.equal(values.to(dtype).float(), values) for values in wide) else torch.float32


def gguf_config(source: str | os.PathLike) -> PreTrainedConfig:
    """The configuration of the model in a GGUF file, with what transformers does not read of it.

    Raises:
        MoEError: transformers does not know the architecture, or would leave out what changes the logits.
    """
    path = read_gguf(source).path
    status = path.stat()
    return copy.deepcopy(_config(path, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=8)
def _config(path: Path, size: int, changed: int) -> PreTrainedConfig:
    from moe_hf.gguf_files.gaps import complete_config

    file = read_gguf(path)
    with reading_errors(file):
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    complete_config(file, config)
    # Of the file's name of itself transformers makes a path.
    vars(config).pop("_model_name_or_path", None)
    config.dtype = file.dtype
    config.name_or_path = str(path)
    return config


@contextmanager
def reading_errors(file: GGUFFile) -> Iterator[None]:
    """What transformers raises of a GGUF file that it cannot read, as one sentence."""
    try:
        yield
    except MoEError:
        raise
    except (*DAMAGE, ImportError, AssertionError, AttributeError) as error:
        raise MoEError(
            f"transformers cannot read {file.path}, whose architecture is {file.architecture!r}: {_reason(error)}. {INSTEAD}"
        ) from error


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
