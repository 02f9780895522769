"""Names of dtypes, the same in every command and argument: those of transformers; the short ones mean the same."""

from collections.abc import Sequence
from typing import Any

from moe_hf.errors import MoEError


SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def dtype_name(given: Any, allowed: Sequence[str]) -> str:
    """The whole name of a dtype.

    Args:
        given (`Any`): what the user gave: a name, whole or short, or a dtype of torch.
        allowed (`Sequence[str]`): the whole names that are taken here, with `"auto"` perhaps.

    Raises:
        MoEError: it is none of them.
    """
    name = str(given).removeprefix("torch.")
    name = SHORT.get(name, name)
    if name not in allowed:
        raise MoEError(f"dtype is {given!r}; it must be {', '.join(allowed[:-1])} or {allowed[-1]}.")
    return name
