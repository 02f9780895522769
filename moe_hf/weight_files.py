"""Safetensors checkpoints read piece by piece: never more in memory than the piece that is asked for."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_hf.checksums import safetensors_header
from moe_hf.errors import MoEError
from moe_hf.saving import check_shard_index


WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# In the order in which safetensors sorts tensors within a file: the later a dtype, the earlier its tensors.
_SORTED_DTYPES = (
    "BOOL:bool U8:uint8 I8:int8 F8_E5M2:float8_e5m2 F8_E4M3:float8_e4m3fn I16:int16 U16:uint16 F16:float16 BF16:bfloat16 "
    "I32:int32 U32:uint32 F32:float32 C64:complex64 F64:float64 I64:int64 U64:uint64"
)
DTYPES = {name: getattr(torch, dtype) for name, dtype in (pair.split(":") for pair in _SORTED_DTYPES.split())}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a tensor that is not in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the first dimension; of the whole tensor when it has no dimension."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


class CheckpointReader:
    """The tensors of a local folder with one or several safetensors files, read when asked for; a context manager.

    Files are read with `pread`, not mapped, so that the memory of the process does not grow with the file.

    Args:
        folder (`str` or `os.PathLike`): the checkpoint. Its index and the headers of its files are checked.

    Attributes:
        tensors (`dict[str, TensorSpec]`): names on the disk to what is there, in the order of the files.

    Raises:
        `MoEError`: no folder, no safetensors weights, a damaged file or index, or a dtype that torch does not have.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.files = weight_files(self.folder)
        self.tensors: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[Path, int]] = {}
        self._descriptors: dict[Path, int] = {}
        listed = _index_map(self.folder) if self.files[0].name != WEIGHTS_NAME else None
        for file in self.files:
            start, facts = safetensors_header(file)
            for name, fact in sorted(facts.items(), key=lambda item: item[1]["data_offsets"]):
                if listed is None or listed.get(name) == file.relative_to(self.folder).as_posix():
                    self.tensors[name] = _spec(file, name, fact)
                    self._places[name] = (file, start + fact["data_offsets"][0])

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; reading again opens them again."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Rows [start, stop) of the first dimension of a tensor, or all, in its dtype, on the CPU; in `out` if given.

        Raises:
            `MoEError`: the name or the rows are not there, or the file became shorter.
        """
        spec = self._spec_of(name)
        rows = spec.shape[0] if spec.shape else 1
        stop = rows if stop is None else stop
        if not 0 <= start <= stop <= rows:
            raise MoEError(f"Rows [{start}, {stop}) of {name!r} were asked for; it has {rows}.")
        shape = (stop - start, *spec.shape[1:]) if spec.shape else ()
        tensor = torch.empty(shape, dtype=spec.dtype) if out is None else out
        file, position = self._places[name]
        view, done = byte_view(tensor), 0
        while done < len(view):
            count = os.preadv(self._descriptor(file), [view[done:]], position + start * spec.row_bytes + done)
            if count == 0:
                raise MoEError(f"{file} ends within {name!r}: it became shorter while it was read.")
            done += count
        return tensor

    def place(self, name: str) -> tuple[int, int]:
        """An open file descriptor and the position of the tensor's first byte."""
        self._spec_of(name)
        file, position = self._places[name]
        return self._descriptor(file), position

    def _spec_of(self, name: str) -> TensorSpec:
        if name not in self.tensors:
            raise MoEError(f"{self.folder} has no tensor {name!r}.")
        return self.tensors[name]

    def _descriptor(self, file: Path) -> int:
        if file not in self._descriptors:
            self._descriptors[file] = os.open(file, os.O_RDONLY)
        return self._descriptors[file]


def weight_files(folder: str | os.PathLike) -> list[Path]:
    """The safetensors files that transformers would load from a folder: `model.safetensors`, else those of the index.

    Raises:
        `MoEError`: there are none, only pickled ones, or one is damaged.
    """
    folder = Path(folder)
    check_shard_index(folder)
    if (folder / WEIGHTS_NAME).is_file():
        return [folder / WEIGHTS_NAME]
    if (folder / INDEX_NAME).is_file():
        return [folder / name for name in sorted(set(_index_map(folder).values()))]
    raise MoEError(
        f"{folder} has neither {WEIGHTS_NAME} nor {INDEX_NAME}; other weight files, pickles for example, cannot be read "
        "piece by piece. Load the model with from_pretrained and write it with save_pretrained first."
    )


def _index_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]


def _spec(file: Path, name: str, fact: dict) -> TensorSpec:
    if fact["dtype"] not in DTYPES:
        raise MoEError(f"{file} stores {name!r} as {fact['dtype']}; that can be read as one of {list(DTYPES)}.")
    spec = TensorSpec(DTYPES[fact["dtype"]], tuple(fact["shape"]))
    begin, end = fact["data_offsets"]
    if end - begin != spec.nbytes:
        raise MoEError(f"{file} is damaged: {name!r} has {end - begin} bytes, its shape and dtype tell {spec.nbytes}.")
    return spec


def byte_view(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, shared with it."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
