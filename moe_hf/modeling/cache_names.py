"""The cache of keys and values among the arguments of a forward and in its output, whatever transformers calls it."""

from collections.abc import Mapping
from typing import Any

from transformers import Cache

from .config_checks import MoEError


# transformers 5.24 renamed the argument and the output `past_key_values` to `cache`; the old name works there until 5.40.
CACHE_NAMES = ("cache", "past_key_values")


def named_cache(values: Mapping[str, Any]) -> dict[str, Cache]:
    """The cache in `values`, the arguments of a forward or its output, under its name there; {} where there is none."""
    # By keys(): an output of transformers answers for the old name too, with a warning.
    found = {name: values[name] for name in CACHE_NAMES if name in values.keys()}  # noqa: SIM118
    # Before 5.24 continuous batching already calls its pages of many sequences `cache`; they have no length.
    return {name: value for name, value in found.items() if hasattr(value, "get_seq_length")}


def cache_of(values: Mapping[str, Any]) -> Cache | None:
    """The cache in `values`, the arguments of a forward or its output; None where there is none."""
    return next(iter(named_cache(values).values()), None)


def named_arguments(names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a forward by name; the cache under the name that it has there, so that both work everywhere.

    Args:
        names: of the forward's arguments, in order.
        args: those given by place.
        kwargs: those given by name.

    Raises:
        MoEError: two caches.
    """
    named = dict(zip(names, args, strict=False)) | kwargs
    given, wanted = named_cache(named), next((name for name in CACHE_NAMES if name in names), None)
    if len(given) > 1:
        raise MoEError(
            f"{' and '.join(given)} are two names of one argument, and both were given: leave one of them out."
        )
    if wanted is None:
        return named
    # None under the old name would be warned of too.
    rest = {
        name: value
        for name, value in named.items()
        if name not in CACHE_NAMES or (value is not None and name not in given)
    }
    return rest | ({wanted: cache_of(given)} if given else {})
