"""Names of weight files in an index: transformers follows one that leads out of the folder, and we do not."""

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
    if not isinstance(name, str) or not name or "\0" in name:
        raise MoEError(f"{source} names {name!r} where a file name is expected.")
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise MoEError(f"{source} names {name!r}, which is outside of its folder: it was not loaded.")


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
