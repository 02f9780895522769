"""What is kept of a matrix that was read once: enough to compare experts with each other, and far less than the matrix.

Letters: D model width, F expert width, S sampled rows.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


SAMPLED_ROWS = 192
# Per side of a matrix, for telling which expert is which.
SIGNATURE_SIDE = 24
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sketch:
    """Figures of one matrix (out, in).

    Attributes:
        shape: (out, in).
        finite: whether every number is.
        constant: the one number that it consists of, or None.
        mean_square: over the sampled rows.
        rows: ln of the mean square of each sampled row, (S,).
        columns: ln of the mean square of each column over the sampled rows, (in,).
        order: how far rows and columns are from drawn independently: 1 for independent draws of one distribution, larger
            for anything that has learnt. The larger one of rows and columns.
        chance: what `order` of independent draws stays below, for a matrix of this size.
        parity, halves: how much the columns of its even rows differ from those of its odd ones, and those of its first rows from
            those of its last, in units of what chance makes: about 1 where rows have no order.
        signature: evenly spaced numbers of it.
    """

    shape: tuple[int, int]
    finite: bool
    constant: float | None
    mean_square: float
    rows: torch.Tensor
    columns: torch.Tensor
    order: float
    chance: float
    parity: float
    halves: float
    signature: torch.Tensor

    @property
    def zeros(self) -> tuple[float, float]:
        """The parts of its rows and of its columns that are zeros."""
        least = math.log(_TINY)
        return tuple(float((sizes <= least + 1e-3).float().mean()) for sizes in (self.rows, self.columns))

    @property
    def learnt(self) -> float:
        """How far beyond chance its order is: below 1 for independent draws."""
        return (self.order - 1) / (self.chance - 1) if self.chance > 1 else 0.0

    @property
    def looks_fresh(self) -> bool:
        """Whether its numbers look drawn independently of each other."""
        return self.constant is None and self.order < self.chance


def sampled_rows(matrix: torch.Tensor, count: int = SAMPLED_ROWS) -> torch.Tensor:
    """Evenly spaced rows in float32, (S, in)."""
    return matrix[evenly(len(matrix), count)].float()


def evenly(size: int, count: int) -> torch.Tensor:
    """At most `count` evenly spaced places of `size`, even and odd ones in turns."""
    if count >= size:
        return torch.arange(size)
    places = torch.linspace(0, size - 2, count, dtype=torch.float64).long()
    return places - places % 2 + torch.arange(count) % 2


def sketch(matrix: torch.Tensor) -> Sketch:
    """Look at a matrix (out, in), floating-point; all of it for what is not finite, else at sampled rows."""
    wide = matrix.float() if matrix.dtype.itemsize == 1 else matrix
    low, high = (float(value) for value in wide.aminmax())
    rows = sampled_rows(matrix)
    squares = rows.square()
    mean = squares.mean()
    row, column = squares.mean(1), squares.mean(0)
    order, chance = _order(squares, mean, row, column)
    places = evenly(len(matrix), SAMPLED_ROWS)
    is_first = places < len(matrix) / 2
    return Sketch(
        shape=tuple(matrix.shape),
        finite=math.isfinite(low) and math.isfinite(high),
        constant=low if low == high else None,
        mean_square=float(mean),
        rows=row.clamp_min(_TINY).log(),
        columns=column.clamp_min(_TINY).log(),
        order=order,
        chance=chance,
        parity=contrast(squares[places % 2 == 0], squares[places % 2 == 1]),
        halves=contrast(squares[is_first], squares[~is_first]),
        signature=spaced_numbers(matrix),
    )


def _order(squares: torch.Tensor, mean: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> tuple[float, float]:
    """How much more the mean squares of rows and columns differ than those of independent numbers would."""
    if mean <= 0 or not torch.isfinite(mean) or min(squares.shape) < 2:
        return 1.0, 0.0
    spread = squares.var() / mean.square()
    height, width = squares.shape
    of_rows = row.var() / mean.square() / (spread / width).clamp_min(_TINY)
    of_columns = column.var() / mean.square() / (spread / height).clamp_min(_TINY)
    # The variance of n draws has a relative error of about sqrt(2 / n), more where their tails are heavy.
    chance = 1 + 6 * math.sqrt(2 / min(height, width))
    return float(torch.maximum(of_rows, of_columns)), chance


def contrast(one: torch.Tensor, other: torch.Tensor) -> float:
    """How much the columns of two groups of squared rows differ in size, beyond a common factor; 1 is what chance makes.

    Args:
        one, other (`torch.Tensor`): (S, in) and (S', in), squares.
    """
    if min(len(one), len(other)) < 4:
        return 1.0
    means = [group.mean(0).clamp_min(_TINY) for group in (one, other)]
    difference = means[0].log() - means[1].log()
    # ln of a mean of n squares varies by the squares' own relative variance over n.
    expected = sum(
        (group.var(0) / mean.square()).mean() / len(group) for group, mean in zip((one, other), means, strict=True)
    )
    return float((difference - difference.mean()).square().mean() / expected.clamp_min(_TINY))


def spaced_numbers(matrix: torch.Tensor) -> torch.Tensor:
    """Evenly spaced numbers of a matrix, in float32."""
    rows, columns = (evenly(size, SIGNATURE_SIDE) for size in matrix.shape)
    return matrix[rows][:, columns].float().flatten()


def signature_of(numbers: Iterable[torch.Tensor]) -> torch.Tensor:
    """One vector for an expert, of the spaced numbers of its projections, in which each weighs the same."""
    parts = [part / part.norm().clamp_min(_TINY) for part in numbers]
    vector = torch.cat(parts)
    return vector / vector.norm().clamp_min(_TINY)


def significant(numbers: int) -> float:
    """The cosine that two unrelated vectors of so many numbers do not reach."""
    return max(0.1, min(0.7, 6 / math.sqrt(numbers)))


def correlation(one: torch.Tensor, other: torch.Tensor) -> float:
    """Pearson's, of two vectors of one length; 0 where one of them is constant."""
    one, other = one.double() - one.double().mean(), other.double() - other.double().mean()
    norm = one.norm() * other.norm()
    return float(one @ other / norm) if norm > 0 and torch.isfinite(norm) else 0.0


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of two tensors of one shape, as vectors; 0 where one of them is zero."""
    one, other = one.flatten().double(), other.flatten().double()
    norm = one.norm() * other.norm()
    return float(one @ other / norm) if norm > 0 and torch.isfinite(norm) else 0.0


def distance(cos: float) -> float:
    """Between two vectors of length 1 with this cosine."""
    return math.sqrt(max(0.0, 2 * (1 - cos)))
