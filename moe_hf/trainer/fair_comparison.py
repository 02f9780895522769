"""What makes a comparison of two trained models fair: each at its own best learning rate, over seeds, with an interval.

Pure functions of numbers: which rates to try, which one won, and what the differences of some seeds say.
"""

from math import cos, exp, isfinite, lgamma, pi, sqrt, tan
from statistics import mean, stdev

from moe_hf.errors import MoEError


# Neighbouring rates differ by this factor, two of them by a decade: losses are flat in the logarithm of the rate around the
# best one, and a finer grid finds little that a different seed would not undo.
RATE_FACTOR = sqrt(10)


def rate_grid(center: float, count: int) -> list[float]:
    """Learning rates to try, in rising order, two per decade, in two digits.

    An even count has one more below `center` than above it: a rate that is too low wastes steps, one too high the model.

    Args:
        center (`float`): above 0; it is among the rates as it is given.
        count (`int`): at least 1.

    Raises:
        MoEError: a rate or a count that cannot be.
    """
    if not (isfinite(center) and center > 0):
        raise MoEError(f"The learning rate that a sweep starts from is {center}; it must be above 0 and finite.")
    if count < 1:
        raise MoEError(f"A sweep of {count} rates tries nothing: give 1 or more.")
    places = range(-(count // 2), count - count // 2)
    return [center if place == 0 else _two_digits(center * RATE_FACTOR**place) for place in places]


def choose_rate(losses: dict[float, float]) -> tuple[float, bool]:
    """The rate with the lowest loss, and whether it is the lowest or the highest that was tried.

    A winner at the edge says where the best rate lies, not which it is: see `rate_beyond`. A loss that is not finite is that
    of a run which diverged, and cannot win; of equal losses the lower rate wins.

    Args:
        losses (`dict[float, float]`): loss by rate, on text that nothing is reported on.

    Raises:
        MoEError: no rate has a finite loss.
    """
    finite = {rate: loss for rate, loss in losses.items() if isfinite(loss)}
    if not finite:
        tried = ", ".join(f"{rate:.3g}" for rate in sorted(losses))
        raise MoEError(f"No learning rate of {tried or 'none'} ended with a finite loss: try lower ones.")
    best = min(sorted(finite), key=finite.get)
    return best, best in (min(losses), max(losses))


def rate_beyond(rates: list[float], best: float) -> float:
    """The next rate to try where `best` is the lowest or the highest of `rates`; below, where it is the only one."""
    return _two_digits(best / RATE_FACTOR if best == min(rates) else best * RATE_FACTOR)


def student_t(confidence: float, degrees: int) -> float:
    """The t between whose negative and itself Student's distribution has `confidence`: 12.706 for 0.95 and 1 degree.

    With t = sqrt(n) tan(a) the density is one of cos(a)^(n - 1), whose integral is found by Simpson's rule and inverted by
    halving: to more digits than an interval shows.

    Raises:
        MoEError: a confidence outside of (0, 1), or fewer than one degree of freedom.
    """
    if not 0 < confidence < 1 or degrees < 1:
        raise MoEError(f"confidence={confidence} must be in (0, 1), and {degrees} degrees of freedom at least 1.")
    low, high = 0.0, pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability_within(middle, degrees) < confidence else (low, middle)
    return sqrt(degrees) * tan((low + high) / 2)


def paired_interval(differences: list[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """`(mean, low, high)` of differences, one per seed: Student's t interval of their mean.

    Raises:
        MoEError: fewer than two differences, which have no spread, or one that is not finite.
    """
    if len(differences) < 2 or not all(map(isfinite, differences)):
        raise MoEError(f"An interval needs two or more finite differences; given: {differences}.")
    middle = mean(differences)
    half = student_t(confidence, len(differences) - 1) * stdev(differences) / sqrt(len(differences))
    return middle, middle - half, middle + half


def verdict(differences: list[float], *, ours: str = "the MoE", theirs: str = "its control", of: str = "loss") -> str:
    """What differences of a loss (ours - theirs, one per seed) say, in one sentence without its full stop.

    One seed, or seeds that changed nothing, give no interval, and no winner.

    Raises:
        MoEError: no difference, or one that is not finite.
    """
    if not differences or not all(map(isfinite, differences)):
        raise MoEError(f"A comparison needs finite differences, one per seed; given: {differences}.")
    middle = mean(differences)
    measured = f"{of} of {ours} minus that of {theirs} is {middle:+.4f}"
    if len(differences) == 1:
        return f"one seed proves nothing: the {measured}, and another seed may turn it around (no interval)"
    if stdev(differences) == 0:
        return f"the {measured} with each of {len(differences)} seeds, which changed nothing (no interval)"
    _, low, high = paired_interval(differences)
    found = f"the {measured}, 95% interval [{low:+.4f}, {high:+.4f}] over {len(differences)} seeds"
    if low <= 0 <= high:
        return f"no difference: {found}, which contains 0"
    return f"{ours if high < 0 else theirs} is better: {found}"


def _two_digits(rate: float) -> float:
    return float(f"{rate:.1e}")


def _probability_within(angle: float, degrees: int, steps: int = 400) -> float:
    """Student's probability between -t and t, t = sqrt(n) tan(angle)."""
    if degrees == 1:
        return 2 * angle / pi
    width = angle / steps
    weights = (1 if i in (0, steps) else 4 if i % 2 else 2 for i in range(steps + 1))
    integral = sum(w * cos(i * width) ** (degrees - 1) for i, w in enumerate(weights)) * width / 3
    return 2 * integral * exp(lgamma((degrees + 1) / 2) - lgamma(degrees / 2)) / sqrt(pi)
