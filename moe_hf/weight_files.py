"""Safetensors checkpoints read and written piece by piece: never more in memory than the piece that is asked for.

A file is laid out before its first number is known: the header comes first, and each tensor has its place, so that
pieces can be written in any order. Names, shards and bytes are those of transformers' `save_pretrained`.
"""

import errno
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from moe_hf.errors import MoEError
from moe_hf.saving import check_shard_index, safetensors_header


WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# In the order in which safetensors sorts tensors within a file: the later a dtype, the earlier its tensors.
_SORTED_DTYPES = (
    "BOOL:bool U8:uint8 I8:int8 F8_E5M2:float8_e5m2 F8_E4M3:float8_e4m3fn I16:int16 U16:uint16 F16:float16 BF16:bfloat16 "
    "I32:int32 U32:uint32 F32:float32 C64:complex64 F64:float64 I64:int64 U64:uint64"
)
DTYPES = {name: getattr(torch, dtype) for name, dtype in (pair.split(":") for pair in _SORTED_DTYPES.split())}
# What the kernel answers for files that it cannot copy between, by file system and version.
_NOT_IN_KERNEL = frozenset({errno.ENOSYS, errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF})
_COPY_BYTES, _BUFFER_BYTES = 1 << 28, 1 << 17
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


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
        """An open file descriptor and the position of the tensor's first byte, for copies within the kernel."""
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


@dataclass(frozen=True)
class FileLayout:
    """One weight file before it is written.

    Attributes:
        name: of the file.
        header: its first bytes.
        tensors: what it holds, in the order of the file.
        positions: of each tensor's first byte in the file.
        size: of the whole file in bytes.
    """

    name: str
    header: bytes
    tensors: dict[str, TensorSpec]
    positions: dict[str, int]
    size: int


def file_layouts(tensors: dict[str, TensorSpec], max_shard_size: int | str = "5GB") -> list[FileLayout]:
    """Distribute tensors, in the order given, over files as `save_pretrained` does.

    Args:
        tensors (`dict[str, TensorSpec]`): names to what will be written.
        max_shard_size (`int` or `str`): bytes of tensors in one file; a larger tensor gets a file of its own.

    Raises:
        `MoEError`: a size that is not understood, or a dtype that safetensors does not have.
    """
    for name, spec in tensors.items():
        if spec.dtype not in _DTYPE_NAMES:
            raise MoEError(f"{name!r} is {spec.dtype}, which safetensors files do not store here.")
    try:
        split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda spec: spec.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise MoEError(f"max_shard_size is {max_shard_size!r}: {error}") from error
    return [
        _layout(file, {name: tensors[name] for name in names}) for file, names in split.filename_to_tensors.items()
    ]


def _layout(file: str, tensors: dict[str, TensorSpec]) -> FileLayout:
    ordered = dict(sorted(tensors.items(), key=lambda item: (-_DTYPE_RANK[item[1].dtype], item[0].encode())))
    facts, offset = {"__metadata__": {"format": "pt"}}, 0
    offsets = {}
    for name, spec in ordered.items():
        offsets[name] = offset
        end = offset + spec.nbytes
        facts[name] = {
            "dtype": _DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    header = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    positions = {name: len(header) + offset for name, offset in offsets.items()}
    return FileLayout(file, header, ordered, positions, len(header) + offset)


class FileWriter:
    """One weight file open for writing, piece by piece in any order; a context manager that ends with a check.

    Leaving the block without an error asserts that each byte of each tensor was written exactly once, and flushes the
    file to the disk.

    Args:
        folder (`Path`): where the file is made.
        layout (`FileLayout`): of the file.
        on_bytes (`Callable`, *optional*): called with the number of bytes after each piece.
    """

    def __init__(self, folder: Path, layout: FileLayout, on_bytes: Callable[[int], None] | None = None):
        self.path, self.layout = Path(folder) / layout.name, layout
        self._on_bytes = on_bytes or (lambda num_bytes: None)
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in layout.tensors}
        with _named_error(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            _write_all(self._descriptor, memoryview(layout.header), 0)

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, kind, *exception) -> None:
        try:
            if kind is None:
                self._check_whole()
                with _named_error(self.path):
                    os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def write(self, name: str, data: torch.Tensor, start: int = 0) -> int:
        """Write a contiguous CPU tensor from byte `start` of tensor `name` on; returns its bytes."""
        expected = self.layout.tensors[name].dtype
        assert data.dtype == expected, f"{name} is {expected} and gets {data.dtype}"
        if data.numel() == 0:
            return 0
        view = byte_view(data)
        position = self._claim(name, start, len(view))
        with _named_error(self.path):
            _write_all(self._descriptor, view, position)
        self._on_bytes(len(view))
        return len(view)

    def copy(self, name: str, start: int, num_bytes: int, source: int, source_position: int) -> None:
        """Fill `num_bytes` from byte `start` of tensor `name` on with those of another open file, within the kernel."""
        position = self._claim(name, start, num_bytes)
        with _named_error(self.path):
            copy_bytes(source, source_position, self._descriptor, position, num_bytes)
        self._on_bytes(num_bytes)

    def place(self, name: str, start: int = 0) -> tuple[int, int]:
        """File descriptor and position of byte `start` of a tensor, to copy from what was written."""
        return self._descriptor, self.layout.positions[name] + start

    def _claim(self, name: str, start: int, num_bytes: int) -> int:
        assert 0 <= start <= start + num_bytes <= self.layout.tensors[name].nbytes, f"outside of {name}"
        self._written[name].append((start, start + num_bytes))
        return self.layout.positions[name] + start

    def _check_whole(self) -> None:
        for name, spans in self._written.items():
            reached = 0
            for begin, end in sorted(spans):
                assert begin == reached, f"{name}: bytes [{min(begin, reached)}, {max(begin, reached)}) " + (
                    "were written twice" if begin < reached else "were not written"
                )
                reached = end
            size = self.layout.tensors[name].nbytes
            assert reached == size, f"{name}: {size - reached} of {size} bytes were not written"


def write_checkpoint(
    folder: str | os.PathLike,
    tensors: dict[str, TensorSpec],
    chunks: Callable[[str], Iterable[torch.Tensor]],
    *,
    max_shard_size: int | str = "5GB",
    total_parameters: int | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write a checkpoint one tensor after the other: `model.safetensors`, or several files with an index.

    Args:
        folder (`str` or `os.PathLike`): an existing folder, which gets the files.
        tensors (`dict[str, TensorSpec]`): names to what will be written, in the order of a model's `state_dict`.
        chunks (`Callable`): `chunks(name)` gives a tensor as consecutive pieces, whose numbers in order are the tensor's.
        max_shard_size (`int` or `str`): bytes of tensors in one file.
        total_parameters (`int`, *optional*): for the index, the numbers of all tensors by default.
        on_bytes (`Callable`, *optional*): called with the number of bytes after each piece.

    Raises:
        `MoEError`: the disk refuses a file. AssertionError when a tensor is not written exactly once and whole.
    """
    folder = Path(folder)
    layouts = file_layouts(tensors, max_shard_size)
    for layout in layouts:
        with FileWriter(folder, layout, on_bytes) as file:
            for name in layout.tensors:
                reached = 0
                for chunk in chunks(name):
                    reached += file.write(name, chunk.contiguous(), reached)
    write_index(folder, layouts, total_parameters)


def write_index(folder: str | os.PathLike, layouts: list[FileLayout], total_parameters: int | None = None) -> None:
    """Write `model.safetensors.index.json` when there is more than one file."""
    if len(layouts) == 1:
        return
    specs = [spec for layout in layouts for spec in layout.tensors.values()]
    if total_parameters is None:
        total_parameters = sum(math.prod(spec.shape) for spec in specs)
    metadata = {"total_parameters": total_parameters, "total_size": sum(spec.nbytes for spec in specs)}
    weight_map = {name: layout.name for layout in layouts for name in layout.tensors}
    content = json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    path = Path(folder) / INDEX_NAME
    with _named_error(path):
        path.write_text(content, encoding="utf-8")


def copy_bytes(source: int, source_position: int, target: int, position: int, num_bytes: int) -> None:
    """Copy bytes between open files within the kernel, or through memory where the kernel refuses.

    Raises:
        `OSError`: the target cannot be written, or the source ends too early (`EIO`).
    """
    done, in_kernel = 0, hasattr(os, "copy_file_range")
    while done < num_bytes:
        count = min(num_bytes - done, _COPY_BYTES)
        if in_kernel:
            try:
                copied = os.copy_file_range(source, target, count, source_position + done, position + done)
            except OSError as error:
                if error.errno not in _NOT_IN_KERNEL:
                    raise
                in_kernel = False
                continue
        else:
            data = os.pread(source, min(count, _BUFFER_BYTES), source_position + done)
            _write_all(target, memoryview(data), position + done)
            copied = len(data)
        if copied == 0:
            raise OSError(errno.EIO, "the file that is copied from ended too early")
        done += copied


def _write_all(descriptor: int, view: memoryview, position: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(descriptor, view[done:], position + done)


@contextmanager
def _named_error(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one that names the file."""
    try:
        yield
    except OSError as error:
        raise MoEError(f"{path} could not be written: {error.strerror or error}.") from error
