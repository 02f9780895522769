"""Safetensors checkpoints written piece by piece, by several threads, and hashed on the way.

A file is laid out before its first number is known: the header comes first, and each tensor has its place, so that
pieces can be written in any order. Names, shards and bytes are those of transformers' `save_pretrained`.
"""

import errno
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from moe_hf.checksums import PartDigests, part_ends
from moe_hf.errors import MoEError
from moe_hf.weight_files import DTYPES, INDEX_NAME, TensorSpec, byte_view


# What a copying thread reads at once: small enough to stay in the processor's cache while it is written several times.
_BUFFER_BYTES = 1 << 20
_COPIERS = min(2, os.cpu_count() or 1)
_HANDED_OVER_BYTES = 1 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True)
class StoredBytes:
    """Bytes of an open file, and where they go.

    Attributes:
        places: for each copy, a tensor's name and a byte in it.
        num_bytes: how many.
        source: descriptor of the file that has them.
        source_position: of the first of them in that file.
    """

    places: Sequence[tuple[str, int]]
    num_bytes: int
    source: int
    source_position: int


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

    @property
    def part_ends(self) -> list[int]:
        """Where the parts end that are hashed by themselves."""
        start = len(self.header)
        spans = [(spec.shape, self.positions[name] - start, spec.nbytes) for name, spec in self.tensors.items()]
        return part_ends(start, [(shape, begin, begin + nbytes) for shape, begin, nbytes in spans])


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
    """One weight file open for writing, piece by piece in any order and by any thread; a context manager.

    What is written is hashed on its way, and handed to the disk as soon as an expert is whole, so that flushing the file
    in the end finds little left to do.

    Args:
        folder (`Path`): where the file is made.
        layout (`FileLayout`): of the file.
        on_bytes (`Callable`, *optional*): called with the number of bytes after each piece.

    Attributes:
        checksum (`dict[str, str]`): of the file for a manifest, when it is closed.
    """

    def __init__(self, folder: Path, layout: FileLayout, on_bytes: Callable[[int], None] | None = None):
        self.path, self.layout = Path(folder) / layout.name, layout
        self._on_bytes = on_bytes or (lambda num_bytes: None)
        self._written: dict[str, list[tuple[int, int]]] = {name: [] for name in layout.tensors}
        self._digests, self.checksum = PartDigests(layout.part_ends), {}
        self._copiers, self._to_disk = ThreadPoolExecutor(_COPIERS), ThreadPoolExecutor(1)
        self._copies: list[Future] = []
        # The kernel lets one write to a file at a time, and burns a processor for each that waits.
        self._writing = threading.Lock()
        with _named_error(self.path):
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            self._write_all(memoryview(layout.header), [0])

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, kind, *exception) -> None:
        self.close() if kind is None else self.abandon()

    def close(self) -> None:
        """Assert that each byte of each tensor was written exactly once, and flush the file to the disk."""
        try:
            while self._copies:
                self._copies.pop(0).result()
            self._check_whole()
            with _named_error(self.path):
                self.checksum = self._digests.checksum(self._descriptor)
                os.fsync(self._descriptor)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        self._copiers.shutdown(cancel_futures=True)
        self._to_disk.shutdown()
        os.close(self._descriptor)

    def write(self, name: str, data: torch.Tensor, start: int = 0) -> int:
        """Write a contiguous CPU tensor from byte `start` of tensor `name` on; returns its bytes."""
        return self.write_same([(name, start)], data)

    def write_same(self, places: Sequence[tuple[str, int]], data: torch.Tensor) -> int:
        """Write a contiguous CPU tensor at several places, each a tensor's name and a byte in it; returns its bytes."""
        for name, _ in places:
            expected = self.layout.tensors[name].dtype
            assert data.dtype == expected, f"{name} is {expected} and gets {data.dtype}"
        if data.numel() == 0:
            return 0
        view = byte_view(data)
        positions = self._claim(places, len(view))
        with _named_error(self.path):
            self._write_all(view, positions)
        self._on_bytes(len(view) * len(places))
        return len(view)

    def copy(self, *stored: StoredBytes) -> None:
        """Copy bytes from other open files, one after the other, by another thread and until `close` at the latest.

        What is asked for together is hashed once when it is given in the order of the file.
        """
        positions = [self._claim(one.places, one.num_bytes) for one in stored]
        self._copies.append(self._copiers.submit(self._copy, stored, positions))

    def _copy(self, stored: Sequence[StoredBytes], positions: Sequence[Sequence[int]]) -> None:
        # Read once and written from memory: a copy within the kernel reads again for each, and hashing reads anyway.
        buffer = memoryview(bytearray(min(_BUFFER_BYTES, max(one.num_bytes for one in stored))))
        with _named_error(self.path):
            for one, starts in zip(stored, positions, strict=True):
                done = 0
                while done < one.num_bytes:
                    piece = buffer[: one.num_bytes - done]
                    count = os.preadv(one.source, [piece], one.source_position + done)
                    if count == 0:
                        raise OSError(errno.EIO, "the file that is copied from ended too early")
                    self._write_all(piece[:count], [start + done for start in starts])
                    self._on_bytes(count * len(starts))
                    done += count

    def _write_all(self, view: memoryview, positions: Sequence[int]) -> None:
        with self._writing:
            for position in positions:
                _write_all(self._descriptor, view, position)
        for start, end in self._digests.absorb(view, positions):
            self._hand_over(start, end)

    def _hand_over(self, start: int, end: int) -> None:
        """Let the disk begin with a range that is written; its pages are dirty, so they stay in memory too."""
        if end - start >= _HANDED_OVER_BYTES:
            self._to_disk.submit(os.posix_fadvise, self._descriptor, start, end - start, os.POSIX_FADV_DONTNEED)

    def _claim(self, places: Sequence[tuple[str, int]], num_bytes: int) -> list[int]:
        positions = []
        for name, start in places:
            assert 0 <= start <= start + num_bytes <= self.layout.tensors[name].nbytes, f"outside of {name}"
            self._written[name].append((start, start + num_bytes))
            positions.append(self.layout.positions[name] + start)
        return positions

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
