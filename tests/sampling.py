"""A law over a product of many cases: each value of each axis in `make test`, all combinations in `make test-all`."""

import itertools
from collections.abc import Iterable, Mapping

import pytest


def sampled(*axes: Iterable, share: int = 3, start: int = 0) -> list:
    """The product of some axes as parameters of pytest; all but one in `share` are slow.

    Those that stay lie on the diagonals: along every axis each value comes as often as any other, and meets every
    `share`-th of the values of another axis.

    Args:
        axes: values, which are their own names, or a mapping from names to values.
        share (`int`): how many combinations one stands for.
        start (`int`): which diagonals; laws over the same cases take turns with it.
    """
    named = [
        list(axis.items()) if isinstance(axis, Mapping) else [(str(value), value) for value in axis] for axis in axes
    ]
    parameters = []
    for places in itertools.product(*(range(len(axis)) for axis in named)):
        names, values = zip(*(axis[place] for axis, place in zip(named, places, strict=True)), strict=True)
        marks = () if (sum(places) + start) % share == 0 else pytest.mark.slow
        parameters.append(pytest.param(*values, id="-".join(names), marks=marks))
    return parameters
