"""Numbers over seeds: means, spreads, 95% intervals, paired differences, and how they are written and drawn."""

from math import exp, log, nan
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt

from moe_hf.trainer.fair_comparison import student_t


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, standard deviation, and half the width of the 95% interval of the mean, of one number per seed."""
    deviation = stdev(values) if len(values) > 1 else nan
    quantile = student_t(0.95, len(values) - 1) if len(values) > 1 else nan
    return {
        "mean": mean(values),
        "std": deviation,
        "interval_95": quantile * deviation / len(values) ** 0.5,
        "per_seed": values,
    }


def paired(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """The spread of ours - theirs, seed by seed."""
    return spread([a - b for a, b in zip(ours, theirs, strict=True)])


def ratio_spread(ratios: list[float]) -> dict[str, Any]:
    """Geometric mean of one ratio per seed, and the 95% interval of it: Student's t of the logarithms."""
    found = spread([log(ratio) for ratio in ratios])
    return {
        "mean": exp(found["mean"]),
        "low": exp(found["mean"] - found["interval_95"]),
        "high": exp(found["mean"] + found["interval_95"]),
        "per_seed": ratios,
    }


def value_text(value: dict[str, Any], digits: int = 4) -> str:
    """`mean (standard deviation)`, of a loss."""
    return f"{value['mean']:.{digits}f}" + if_known(f" ({value['std']:.{digits}f})", value)


def difference_text(value: dict[str, Any], digits: int = 4) -> str:
    """`mean (standard deviation) [low, high]` with signs."""
    return f"{value['mean']:+.{digits}f}" + if_known(
        f" ({value['std']:.{digits}f}) {interval_text(value, digits)}", value
    )


def interval_text(value: dict[str, Any], digits: int = 4) -> str:
    """`[low, high]`, the 95% interval."""
    low, high = value["mean"] - value["interval_95"], value["mean"] + value["interval_95"]
    return f"[{low:+.{digits}f}, {high:+.{digits}f}]"


def ratio_text(value: dict[str, Any]) -> str:
    """`mean [low, high]` of ratios."""
    return f"{value['mean']:.2f}" + if_known(f" [{value['low']:.2f}, {value['high']:.2f}]", value)


def if_known(text: str, value: dict[str, Any]) -> str:
    """Nothing for a single seed, which has no spread."""
    return text if len(value["per_seed"]) > 1 else ""


def draw_band(
    axes: plt.Axes, at: list[float], runs: list[list[float]], *, color: str, label: str, **line: Any
) -> None:
    """Draw the mean of curves over seeds, with a band of one standard deviation to each side."""
    spreads = [spread(list(values)) for values in zip(*runs, strict=True)]
    middle = [value["mean"] for value in spreads]
    axes.plot(at, middle, color=color, label=label, **line)
    if len(runs) > 1:
        low, high = ([m + sign * v["std"] for m, v in zip(middle, spreads, strict=True)] for sign in (-1, 1))
        axes.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
