"""What the files of a local checkpoint name, and transformers would follow: weights elsewhere, and kernels of the Hub."""

import json
import os
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from .config_checks import MoEError


def refuse_outside(name: Any, source: str | os.PathLike) -> None:
    """Refuse what is no relative name of a file below its folder, on any operating system.

    Args:
        name (`Any`): as it was read.
        source (`str` or `os.PathLike`): where it was read, for the message.

    Raises:
        `MoEError`: an absolute path, `..`, a drive, a NUL, an empty name, or something else than text.
    """
    if not _can_be_a_name(name):
        raise MoEError(f"{source} names {ascii(name)[:200]} where a file name is expected.")
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise MoEError(f"{source} names {name!r}, which is outside of its folder: it was not loaded.")


def _can_be_a_name(name: Any) -> bool:
    """Whether a file system could have it: text without NUL and lone surrogates, no part of more than 255 bytes."""
    if not isinstance(name, str) or not name or "\0" in name or any("\ud800" <= c <= "\udfff" for c in name):
        return False
    return len(name) < 4096 and all(len(part.encode()) <= 255 for part in name.split("/"))


def check_index_names(folder: str | os.PathLike) -> None:
    """Check the file names in the indexes of a local folder; what is no such folder, such as a Hub id, passes.

    The Hub's client refuses such names by itself.

    Raises:
        `MoEError`: see [`refuse_outside`]; or an index that cannot be read.
    """
    for index in sorted(Path(folder).glob("*.index.json")):
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = set(weight_map.values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise MoEError(f"{index} cannot be read as an index of weights: {type(error).__name__}.") from error
        for name in names:
            refuse_outside(name, index)


def check_kernel_names(folder: str | os.PathLike) -> None:
    """Refuse a local configuration that names a kernel of the Hub, which transformers would fetch and run.

    Whoever loads a model may ask for one, with `attn_implementation=...`; a file may not.

    Raises:
        `MoEError`: with the field. What cannot be read is left to the reader of configurations.
    """
    try:
        content = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    text_config = content.get("text_config") if isinstance(content, dict) else None
    for config in (content, text_config):
        for name, value in config.items() if isinstance(config, dict) else ():
            if "_implementation" in name and isinstance(value, str) and "/" in value:
                raise MoEError(
                    f"{folder}: {name} is {value!r}, code from the Hub, and a checkpoint may not name that. Remove the "
                    "field; to use the kernel, pass its name to from_pretrained."
                )
