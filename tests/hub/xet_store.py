"""What the real xet client wrote into a local store: the hash of each file by its sha256, read from the shards.

A shard is a header of 48 bytes, then a section of records of 48 bytes: a file's hash, flags and number of entries; the
entries; as many verification entries if flag 31 is set; one record with the sha256 if flag 30 is set. A hash of ones ends
the section. Hashes are four little-endian 64-bit words, written as text word by word.
"""

import struct
from pathlib import Path


_RECORD = 48
_HAS_VERIFICATION, _HAS_SHA256 = 1 << 31, 1 << 30


def xet_hashes(store: Path) -> dict[str, str]:
    """sha256 -> xet hash, of every file that was uploaded to a `local://` store."""
    found = {}
    for shard in store.rglob("*.mdb"):
        data, place = shard.read_bytes(), _RECORD
        while data[place : place + 32] != b"\xff" * 32:
            flags, entries = struct.unpack_from("<II", data, place + 32)
            file_hash = _text(data[place : place + 32])
            place += _RECORD * (1 + entries * (2 if flags & _HAS_VERIFICATION else 1))
            if flags & _HAS_SHA256:
                found[_text(data[place : place + 32])] = file_hash
                place += _RECORD
    return found


def _text(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))
