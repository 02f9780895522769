"""`INITIALISERS`: the initialisers by name. Where an `init` is expected, a name means its default options."""

from collections.abc import Mapping
from typing import Any

from moe_hf.upcycling.choices import make_choice
from moe_hf.upcycling.initialisers.base import DenseLayer, Initialiser
from moe_hf.upcycling.initialisers.copies import Copy, Drop, Granular, Permute
from moe_hf.upcycling.initialisers.mix import Mix
from moe_hf.upcycling.initialisers.split import Split


__all__ = [
    "INITIALISERS",
    "Copy",
    "DenseLayer",
    "Drop",
    "Granular",
    "Initialiser",
    "Mix",
    "Permute",
    "Split",
    "make_initialiser",
]

INITIALISERS: dict[str, type[Initialiser]] = {cls.name: cls for cls in (Copy, Drop, Permute, Granular, Split, Mix)}


def make_initialiser(init: str | Initialiser, options: Mapping[str, Any] | None = None) -> Initialiser:
    """The initialiser that `init` names, with its options; an instance is returned as it is.

    Raises:
        MoEError: for an unknown name or option, or a value outside its range.
    """
    return make_choice("init", init, options, INITIALISERS, Initialiser)
