"""When two results are the same: stored numbers bitwise, computed ones up to the rounding of a sum.

Kernels choose the order in which they add by where a tensor lies in memory, and copies of one tensor (loaded, unpickled,
gathered, a slice) lie elsewhere. So the same weights need not give the same bits, on every machine: only what is copied is
compared by `torch.equal`, and what is computed from copies by `close`.

Two runs of one process whose tensors torch itself allocates, in the same sizes, are equal bitwise on every machine: it starts them
all at multiples of 64 bytes. So one model that is called twice, and a run that is resumed, are compared bitwise.
"""

from collections.abc import Mapping

import torch


# The longest sums of the tiny models. An order of adding n numbers moves their sum by some sqrt(n) roundings.
SUMMANDS = 256


def rounding(dtype: torch.dtype) -> float:
    """How far apart, relative to the largest number, two results may be: 1.9e-6 in float32, 3.6e-15 in float64.

    Products of 16-bit numbers are added in float32, so only the last bit of a result moves, and once more in what follows.
    """
    epsilon = torch.finfo(dtype).eps
    return 2 * epsilon if torch.finfo(dtype).bits < 32 else SUMMANDS**0.5 * epsilon


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are the same computation's: dtype, shape, and numbers up to `rounding`; integers bitwise."""
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    if not expected.is_floating_point() or torch.equal(actual, expected):
        return torch.equal(actual, expected)
    difference, largest = (actual.double() - expected.double()).abs().max(), expected.double().abs().max()
    # NaN and infinity are close to nothing.
    return bool(difference.isfinite() and difference <= rounding(expected.dtype) * largest)


def bitwise(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether two models hold the same weights: names, dtypes and every bit."""
    return actual.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]) for name, tensor in actual.items()
    )
