"""Checksums of files: sha256, and for weights sha256 of parts, which several threads compute and equal parts share.

The parts of a safetensors file are its header, then each tensor in the order of the file; a tensor with three or more
dimensions is cut into the entries of its first one, the experts of a fused tensor, where these are not small. So the
weights of a large checkpoint are hashed with all cores, and an expert that is written several times is hashed once.
"""

import hashlib
import json
import os
import struct
import threading
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moe_hf.errors import MoEError


SHA256, SHA256_OF_PARTS = "sha256", "sha256_of_parts"
# Of an entry of a tensor's first dimension that is a part of its own.
LEAST_PART_BYTES = 1 << 16
# The safetensors library itself refuses a longer header.
_MAX_SAFETENSORS_HEADER = 100_000_000
_CHUNK_BYTES = 1 << 18


def file_checksum(path: str | os.PathLike) -> dict[str, str]:
    """What a manifest says of a file's bytes: `sha256_of_parts` of safetensors files, `sha256` of others.

    Returns:
        one entry, in lower-case hexadecimal.
    """
    ends = safetensors_parts(path)
    return {SHA256: file_sha256(path)} if ends is None else {SHA256_OF_PARTS: _hash_parts(path, ends)}


def has_checksum(path: str | os.PathLike, checksum: Mapping[str, Any]) -> bool:
    """Whether a file has the bytes that an entry of a manifest tells, of either kind."""
    if SHA256 in checksum:
        return file_sha256(path) == checksum[SHA256]
    return file_checksum(path).get(SHA256_OF_PARTS) == checksum[SHA256_OF_PARTS]


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes, in lower-case hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safetensors_parts(path: str | os.PathLike) -> list[int] | None:
    """Where the parts of a safetensors file end, the last one with the file; None for any other file."""
    if Path(path).suffix != ".safetensors":
        return None
    try:
        start, facts = safetensors_header(path)
        ends = part_ends(start, [(tuple(fact["shape"]), *fact["data_offsets"]) for fact in facts.values()])
    except (MoEError, TypeError, ValueError, KeyError):
        return None
    return ends if ends == sorted(ends) and ends[-1] == os.path.getsize(path) else None


def part_ends(data_start: int, tensors: list[tuple[tuple[int, ...], int, int]]) -> list[int]:
    """Where the parts end: the header at `data_start`, then of tensors given as shape, first byte, last byte + 1."""
    ends = [data_start]
    for shape, begin, end in sorted(tensors, key=lambda tensor: tensor[1:]):
        count = shape[0] if len(shape) > 2 and end - begin >= shape[0] * LEAST_PART_BYTES else 1
        ends += [data_start + begin + (end - begin) * (index + 1) // count for index in range(count)]
    return ends


def digest_of_parts(digests: list[bytes]) -> str:
    """The checksum of a file from the sha256 of its parts."""
    return hashlib.sha256(b"".join(digests)).hexdigest()


def hash_part(descriptor: int, start: int, end: int) -> bytes:
    """sha256 of a range of an open file.

    Raises:
        `OSError`: the file ends before.
    """
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(_CHUNK_BYTES, max(1, end - start))))
    while start < end:
        count = os.preadv(descriptor, [buffer[: end - start]], start)
        if count == 0:
            raise OSError("the file became shorter while it was read")
        digest.update(buffer[:count])
        start += count
    return digest.digest()


def _hash_parts(path: str | os.PathLike, ends: list[int]) -> str:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            starts = [0, *ends[:-1]]
            return digest_of_parts(list(pool.map(hash_part, [descriptor] * len(ends), starts, ends)))
    finally:
        os.close(descriptor)


class PartDigests:
    """The checksum of a file while it is written, by any number of threads; equal bytes are hashed once.

    A part that is not written from its beginning to its end is read again when the checksum is asked for.

    Args:
        ends (`Sequence[int]`): where the parts end.
    """

    def __init__(self, ends: Sequence[int]):
        self._ends, self._starts = list(ends), [0, *ends[:-1]]
        # Parts of equal bytes so far share one digest, which is replaced and never changed; None when bytes are missing.
        self._digests: list[Any] = [hashlib.sha256()] * len(self._ends)
        self._reached = list(self._starts)
        self._locks = [threading.Lock() for _ in self._ends]

    def absorb(self, view: memoryview, positions: Sequence[int]) -> list[tuple[int, int]]:
        """Take note that `view` is written at each of the positions; returns the ranges of parts that are whole now."""
        made: dict[tuple[int, int, int], tuple[Any, Any]] = {}
        whole = []
        for position in positions:
            part, done = bisect_right(self._ends, position), 0
            while done < len(view):
                count = min(self._ends[part] - position - done, len(view) - done)
                with self._locks[part]:
                    self._extend(part, position + done, view, done, count, made)
                    if self._reached[part] == self._ends[part]:
                        whole.append((self._starts[part], self._ends[part]))
                part, done = part + 1, done + count
        return whole

    def _extend(self, part: int, position: int, view: memoryview, done: int, count: int, made: dict) -> None:
        old = self._digests[part]
        if old is None or position != self._reached[part]:
            self._digests[part] = None
            return
        key = id(old), done, count
        if key not in made:
            new = old.copy()
            new.update(view[done : done + count])
            # The old one is kept, so that no other object can get its id.
            made[key] = (old, new)
        self._digests[part] = made[key][1]
        self._reached[part] = position + count

    def checksum(self, descriptor: int) -> dict[str, str]:
        """That of the whole file, as `file_checksum` would give it.

        Args:
            descriptor (`int`): of the file, to read what was not written in order.
        """
        digests = []
        for part, digest in enumerate(self._digests):
            in_order = digest is not None and self._reached[part] == self._ends[part]
            digests.append(
                digest.digest() if in_order else hash_part(descriptor, self._starts[part], self._ends[part])
            )
        return {SHA256_OF_PARTS: digest_of_parts(digests)}


def _is_tensor_fact(fact: Any) -> bool:
    if not isinstance(fact, dict) or not isinstance(fact.get("dtype"), str):
        return False
    shape, place = fact.get("shape"), fact.get("data_offsets")
    sizes = [*shape, *place] if isinstance(shape, list) and isinstance(place, list) else [None]
    return all(type(size) is int and size >= 0 for size in sizes) and len(place) == 2 and place[0] <= place[1]


def safetensors_header(path: str | os.PathLike) -> tuple[int, dict[str, dict[str, Any]]]:
    """Read the header of a safetensors file whose length agrees with it.

    Returns:
        the position of the first data byte, and tensor names to their `dtype`, `shape` and `data_offsets`.

    Raises:
        `MoEError`: the file is truncated, longer than its header tells, or no safetensors file.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or 8 + length > size:
            raise MoEError(
                f"{path} is truncated: {size} bytes are less than its header. Use another copy of the file."
            )
        if length > _MAX_SAFETENSORS_HEADER:
            raise MoEError(f"{path} is no safetensors file: it declares a header of {length} bytes.")
        header = file.read(length)
    try:
        tensors = {name: fact for name, fact in json.loads(header).items() if name != "__metadata__"}
    except (ValueError, AttributeError, RecursionError) as error:
        raise MoEError(f"{path} is no safetensors file: its header cannot be read.") from error
    for name, fact in tensors.items():
        if not _is_tensor_fact(fact):
            raise MoEError(f"{path} is no safetensors file: its header has no dtype, shape and place for {name!r}.")
    expected = 8 + length + max((fact["data_offsets"][1] for fact in tensors.values()), default=0)
    if size != expected:
        kind = "truncated" if size < expected else "damaged"
        raise MoEError(f"{path} is {kind}: {size} bytes, its header tells {expected}. Use another copy of the file.")
    return 8 + length, tensors
