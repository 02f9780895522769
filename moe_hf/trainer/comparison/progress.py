"""Which runs a comparison has, which is next, and how long the rest will take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One training: its name in the record, its arm, its rate, which seed, and the share of the steps that it takes."""

    name: str
    arm: str
    rate: float | None
    seed: int = 0
    share: float = 1.0

    def words(self) -> str:
        """What is said of it; the rate of a run after the sweep is known when it is its turn."""
        what = f"seed {self.seed}" if self.share == 1 else "sweep"
        return f"{what}, {self.arm}" + ("" if self.rate is None else f" at the learning rate {self.rate:g}")


def seconds_left(runs: list[Run], finished: Mapping[str, Any]) -> float | None:
    """What the runs that are not finished will take, as long per step as the finished ones of their arm; None before the first.

    An arm of which nothing is finished is taken to be as slow as the other.
    """
    speeds: dict[str, list[float]] = {}
    for run in runs:
        if run.name in finished:
            speeds.setdefault(run.arm, []).append(finished[run.name]["seconds"] / run.share)
    if not speeds:
        return None
    means = {arm: sum(values) / len(values) for arm, values in speeds.items()}
    slowest = max(means.values())
    return sum(run.share * means.get(run.arm, slowest) for run in runs if run.name not in finished)


def progress_line(run: Run, runs: list[Run], finished: Mapping[str, Any]) -> str:
    """`Comparison, run 3 of 8: ...; about 4 min left.`"""
    seconds = seconds_left(runs, finished)
    left = "how long it takes is known after this run" if seconds is None else f"about {duration(seconds)} left"
    return f"Comparison, run {runs.index(run) + 1} of {len(runs)}: {run.words()}; {left}."


def duration(seconds: float) -> str:
    """A time as a person says it: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
