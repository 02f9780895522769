"""Checksums of files: of parts, in whatever order they are written, and equal bytes hashed once."""

import hashlib
import json
import os
import random

import pytest
import torch
from safetensors.torch import save_file

from moe_hf import checksums
from moe_hf.checksums import PartDigests, file_checksum, has_checksum, part_ends, safetensors_parts


def _weights(folder):
    """A file with a fused tensor of large experts, one of small ones, and others; returns its path."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "a.experts": torch.randn(3, 130, 128, generator=generator),
        "b.experts": torch.randn(4, 5, 6, generator=generator),
        "c.weight": torch.randn(300, 70, generator=generator).bfloat16(),
        "d.empty": torch.zeros(0, 3),
        "e.scalar": torch.tensor(2.5),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def _naive(path) -> str:
    """The definition: sha256 of the sha256 of the header, of each tensor, and of each large expert."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    facts = json.loads(data[8:start])
    parts = [data[:start]]
    for fact in sorted(facts.values(), key=lambda fact: fact["data_offsets"]):
        begin, end = fact["data_offsets"]
        tensor, count = data[start + begin : start + end], fact["shape"][0] if len(fact["shape"]) == 3 else 1
        large = count and len(tensor) // count >= 1 << 16
        step = len(tensor) // count if large else len(tensor)
        parts += [tensor[i * step : (i + 1) * step] for i in range(count if large else 1)]
    assert b"".join(parts) == data
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def test_the_checksum_of_weights_is_that_of_their_parts(tmp_path):
    path = _weights(tmp_path)
    assert file_checksum(path) == {"sha256_of_parts": _naive(path)}
    assert len(safetensors_parts(path)) == 1 + 3 + 1 + 1 + 1 + 1


@pytest.mark.parametrize("name", ["weights.bin", "model.safetensors"])
def test_other_files_have_their_sha256(tmp_path, name):
    (tmp_path / name).write_bytes(b"no header" * 100)
    assert file_checksum(tmp_path / name) == {"sha256": hashlib.sha256(b"no header" * 100).hexdigest()}


def test_each_changed_byte_is_found_and_both_kinds_of_checksum_are_understood(tmp_path):
    path = _weights(tmp_path)
    data = path.read_bytes()
    given = [file_checksum(path), {"sha256": hashlib.sha256(data).hexdigest()}]
    assert all(has_checksum(path, checksum) for checksum in given)
    start = 8 + int.from_bytes(data[:8], "little")
    for position in (0, 7, 8, start - 1, start, start + 130 * 128 * 4, len(data) - 1):
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert not any(has_checksum(path, checksum) for checksum in given)
    # Experts in another order: the same parts, elsewhere.
    path.write_bytes(data)
    size, first = 130 * 128 * 4, data.index(data[start : start + 130 * 128 * 4])
    path.write_bytes(
        data[:first] + data[first + size : first + 2 * size] + data[first : first + size] + data[first + 2 * size :]
    )
    assert not any(has_checksum(path, checksum) for checksum in given)


@pytest.mark.parametrize("order", ["in order", "parts in any order", "in any order"])
def test_the_digest_of_what_is_written_is_that_of_the_file(tmp_path, order):
    path = _weights(tmp_path)
    data, ends = path.read_bytes(), safetensors_parts(path)
    pieces = [(start, data[start : start + 4096]) for start in range(0, len(data), 4096)]
    if order != "in order":
        starts = [0, *ends[:-1]]
        by_part = [
            [(at, data[at : min(at + 5000, end)]) for at in range(start, end, 5000)]
            for start, end in zip(starts, ends, strict=True)
        ]
        random.Random(0).shuffle(by_part)
        pieces = [piece for part in by_part for piece in part]
    if order == "in any order":
        random.Random(1).shuffle(pieces)
    digests = PartDigests(ends)
    for start, piece in pieces:
        digests.absorb(memoryview(piece), [start])
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert digests.checksum(descriptor) == file_checksum(path)
    finally:
        os.close(descriptor)


def test_bytes_that_are_written_at_several_places_are_hashed_once(tmp_path, monkeypatch):
    hashed, sha256 = [], hashlib.sha256

    class Counting:
        def __init__(self, digest=None):
            self.digest_ = digest or sha256()

        def update(self, view):
            hashed.append(len(view))
            self.digest_.update(view)

        def copy(self):
            return Counting(self.digest_.copy())

        def digest(self):
            return self.digest_.digest()

    expert, other, size = os.urandom(100_000), os.urandom(100_000), 100_000
    path = tmp_path / "model.safetensors"
    tensors = [((4, 1, size), 0, 4 * size)]
    monkeypatch.setattr(checksums.hashlib, "sha256", Counting)
    digests = PartDigests(part_ends(0, tensors))
    half = size // 2
    digests.absorb(memoryview(expert)[:half], [0, size, 3 * size])
    digests.absorb(memoryview(other), [2 * size])
    digests.absorb(memoryview(expert)[half:], [half, size + half, 3 * size + half])
    monkeypatch.undo()
    assert sum(hashed) == 2 * size
    path.write_bytes(expert + expert + other + expert)
    with open(path, "rb") as file:
        ends = [0, size, 2 * size, 3 * size, 4 * size]
        whole = [checksums.hash_part(file.fileno(), *span) for span in zip([0, *ends[:-1]], ends, strict=True)]
        assert digests.checksum(file.fileno()) == {"sha256_of_parts": checksums.digest_of_parts(whole)}
