"""Inputs that are nearly right: JSON changed in a few places, files damaged in a few bytes, safetensors put together anew."""

import json
import struct
from copy import deepcopy
from pathlib import Path
from typing import Any

from hypothesis import strategies as st


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.just("../x"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
# What breaks readers more often than chance finds it.
ODD = (
    *(0, -1, 1, 2, 3, 1 << 31, 1 << 63, 1 << 64, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "0", "1", "../x", "/etc/passwd", "\0", "a\\b", "\ud800", "x" * 3000, "float32", "auto", "null"),
    *(True, False, None, [], {}, [[]], [None], {"": {}}, [1, 1], {"x": 1}),
)
_GONE, _TWICE = object(), object()


def mutated(valid: Any) -> st.SearchStrategy:
    """`valid` with one to three values replaced, removed, misnamed or moved, at any depth."""
    places = list(_places(valid))
    values = st.sampled_from(ODD) | st.sampled_from(places).map(lambda place: _at(valid, place)) | JSON
    changes = st.tuples(st.sampled_from(places), values | st.sampled_from([_GONE, _TWICE]))
    return st.lists(changes, min_size=1, max_size=3).map(lambda changes: _changed(valid, changes))


def damaged_text(content: st.SearchStrategy) -> st.SearchStrategy:
    """The JSON of `content` as bytes, of which some examples are cut, have other bytes, or are no JSON at all."""
    text = content.map(to_bytes)
    cut = st.builds(lambda text, end: text[: end % (len(text) + 1)], text, st.integers(0, 1 << 20))
    other = st.builds(
        lambda text, at, new: text[: at % (len(text) + 1)] + new + text[at % (len(text) + 1) + len(new) // 2 :],
        text,
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=4) | st.sampled_from([b"{", b"[" * 5000, b'"', b"NaN", b",", b"1" * 5000]),
    )
    return st.one_of(text, text, text, cut, other, st.text(max_size=40).map(to_bytes), st.binary(max_size=40))


def to_bytes(content: Any) -> bytes:
    """JSON of anything but text, which stays as it is."""
    text = content if isinstance(content, str) else json.dumps(content)
    return text.encode("utf-8", errors="replace")


def unpacked(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file; the JSON that its metadata holds as text under `facts` is parsed too."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if "facts" in header.get("__metadata__", {}):
        header["__metadata__"]["facts"] = json.loads(header["__metadata__"]["facts"])
    return header, content[8 + length :]


def packed(header: Any, data: bytes, length: int | None = None) -> bytes:
    """The inverse of `unpacked`, whatever the header is now; `length` is what the file claims of its header."""
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    if isinstance(metadata, dict) and not isinstance(metadata.get("facts", ""), str):
        header = {**header, "__metadata__": {**metadata, "facts": json.dumps(metadata["facts"])}}
    text = to_bytes(header)
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def damaged_safetensors(file: Path) -> st.SearchStrategy:
    """Bytes of a safetensors file whose header is changed; in some examples its length, the end of its data or any byte."""
    header, data = unpacked(file)
    lengths = st.sampled_from([None, None, None]) | st.integers(0, 2**64 - 1) | st.integers(0, 3000)
    ends = st.sampled_from([data] * 4) | st.integers(0, len(data)).map(lambda end: data[:end]) | st.just(data + b"x")
    rebuilt = st.builds(packed, mutated(header), ends, lengths)
    whole = file.read_bytes()
    flipped = st.builds(
        lambda at, value: whole[:at] + bytes([value]) + whole[at + 1 :],
        st.integers(0, len(whole) - len(data) - 1),
        st.integers(0, 255),
    )
    return st.one_of(rebuilt, rebuilt, rebuilt, flipped)


def _places(value: Any, so_far: tuple = ()):
    if so_far:
        yield so_far
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(inner, (*so_far, key))


def _at(value: Any, place: tuple) -> Any:
    for key in place:
        value = value[key]
    return value


def _changed(valid: Any, changes: list[tuple[tuple, Any]]) -> Any:
    result = json.loads(json.dumps(valid))
    for (*way, last), new in changes:
        owner = result
        try:
            for key in way:
                owner = owner[key]
            if new is _GONE:
                del owner[last]
            elif new is _TWICE and isinstance(owner, dict):
                # A key that is nearly right, with a value that was right elsewhere.
                owner[f"{last}_"] = deepcopy(owner[last])
            elif new is _TWICE:
                owner.append(deepcopy(owner[last]))
            else:
                # A copy: later changes must not reach into `valid`, or into what is put in twice.
                owner[last] = deepcopy(new)
        except (AttributeError, KeyError, IndexError, TypeError):
            # An earlier change took the place away.
            continue
    return result
