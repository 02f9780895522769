"""Pictures of a routing report, as PNG files.

Letters: L MoE layers, E experts, G groups of tokens.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, TwoSlopeNorm
from matplotlib.figure import Figure

from moe_hf.reporting.statistics import LayerStatistics, RoutingStatistics, group_lift


DPI = 110
# More cells than that get no number in them, more rows or columns fewer labels.
LARGEST_LABELLED = 16
PANELS = 9
# Choices over those of all tokens have their full colour from here on: rare groups reach large figures by chance.
LARGEST_LIFT = 3.0
BLUE, ORANGE = "#2b6cb0", "#c05621"


def filled_table(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """Rows of different lengths as one table, float64, filled up with NaN."""
    table = torch.full((len(rows), max(map(len, rows))), math.nan, dtype=torch.float64)
    for place, row in enumerate(rows):
        table[place, : len(row)] = row
    return table


def cell_scale(largest: float) -> tuple[float, int, str]:
    """How cells up to `largest` are written, with three digits of it: divided by what, with how many decimals, and what the
    title says of it.
    """
    power = math.floor(math.log10(largest)) if largest > 0 else 0
    if power >= -2:
        return 1.0, max(2 - power, 0) if power < 0 else 2, ""
    return 10.0**power, 2, f"in units of 1e{power}"


def heat_map(
    axes: Axes,
    values: torch.Tensor,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str,
    centre: float | None = 1.0,
    largest: float | None = None,
) -> None:
    """Draw a matrix onto `axes` with its colour bar: white at `centre`, or from white at 0 up where there is none.

    Args:
        values (`torch.Tensor`): (rows, columns), at least 0; NaN is left blank.
        largest (`float`, *optional*): the value of the darkest colour; the largest of `values` by default.
    """
    largest = largest or float(values.nan_to_num().max())
    unit, decimals, words = cell_scale(largest) if centre is None else (1.0, 2, "")
    title = ", ".join(filter(None, (title, words)))
    if centre is None:
        image = axes.imshow(values.numpy(), cmap="Blues", norm=Normalize(0, max(largest, 1e-12)), aspect="auto")
    else:
        norm = TwoSlopeNorm(centre, 0.0, max(largest, 2 * centre))
        image = axes.imshow(values.numpy(), cmap="RdBu_r", norm=norm, aspect="auto")
    for labels, set_ticks in ((column_labels, axes.set_xticks), (row_labels, axes.set_yticks)):
        step = -(-len(labels) // (2 * LARGEST_LABELLED))
        set_ticks(range(0, len(labels), step), labels[::step])
    axes.tick_params(length=0, labelsize=8)
    axes.set_title(title, fontsize=9)
    if values.shape[1] <= LARGEST_LABELLED and values.shape[0] <= 2 * LARGEST_LABELLED:
        for row, line in enumerate(values.tolist()):
            for column, value in enumerate(line):
                if not math.isnan(value):
                    red, green, blue, _ = image.cmap(image.norm(value))
                    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
                    color = "white" if dark else "black"
                    axes.text(
                        column, row, f"{value / unit:.{decimals}f}", ha="center", va="center", fontsize=6, color=color
                    )
    axes.spines[:].set_visible(False)
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7)


def plot_routing(statistics: RoutingStatistics, path: str | os.PathLike, *, title: str = "Routing") -> Path:
    """Write a PNG with the load of each expert by layer, and beside it MaxVio and entropy of each layer.

    Args:
        statistics (`RoutingStatistics`): from `routing_statistics`.
        path (`str` or `os.PathLike`): the picture; its folder exists.

    Returns:
        `pathlib.Path` of the picture.
    """
    layers = statistics.layers
    labels = [layer.label for layer in layers]
    height = 1.6 + min(0.3 * len(layers), 8)
    figure = Figure(figsize=(10, height), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[6, 2, 2.3])
    load = filled_table([layer.load for layer in layers])
    heat_map(left, load, labels, _numbers(load.shape[1]), title="load by layer and expert (1 = even share)")
    left.set_xlabel("expert", fontsize=8)
    left.set_ylabel("layer", fontsize=8)
    bars = (
        (middle, [layer.max_violation for layer in layers], "MaxVio (0 = balanced)", ORANGE),
        (right, [layer.relative_entropy for layer in layers], "entropy / ln E (1 = undecided)", BLUE),
    )
    for axes, values, name, color in bars:
        _bars(axes, values, labels, name, color)
    right.set_xlim(0, 1)
    figure.suptitle(f"{title}: {statistics.num_tokens:,} tokens", fontsize=10)
    return _save(figure, path)


def plot_groups(statistics: RoutingStatistics, kind: str, path: str | os.PathLike) -> Path:
    """Write a PNG with one heat map per group of a kind: how much more often its tokens choose an expert than all do."""
    names = statistics.groups[kind]
    lifts = [group_lift(layer.groups[kind]) for layer in statistics.layers]
    panels = [
        (f"{name} ({int(counts):,} choices)", filled_table([lift[group] for lift in lifts]))
        for group, (name, counts) in enumerate(zip(names, choices_of_groups(statistics, kind), strict=True))
    ]
    labels = [layer.label for layer in statistics.layers]
    title = f"choices by {kind}, over those of all tokens (1 = no difference)"
    return _save(_panels(panels, labels, title, centre=1.0), path)


def plot_co_activation(statistics: RoutingStatistics, path: str | os.PathLike) -> Path:
    """Write a PNG with, for up to 9 layers, the share of a row's expert's tokens that the column's expert serves too."""
    panels = []
    for layer in spread_over(statistics.layers, PANELS):
        share = layer.co_activation().fill_diagonal_(math.nan)
        panels.append((f"layer {layer.label}", share))
    title = "of the tokens of the row's expert, the share that the column's serves too"
    return _save(_panels(panels, None, title, centre=None), path)


def plot_table(
    statistics: RoutingStatistics, rows: Sequence[torch.Tensor], path: str | os.PathLike, *, title: str
) -> Path:
    """Write a PNG of one figure per layer and expert, from 0 up."""
    labels = [layer.label for layer in statistics.layers]
    return _save(_panels([("", filled_table(rows))], labels, title, centre=None), path)


def choices_of_groups(statistics: RoutingStatistics, kind: str) -> torch.Tensor:
    """How many choices the tokens of each group made in all layers, (G,)."""
    return sum(layer.groups[kind].sum(1) for layer in statistics.layers)


def largest_of(tables: Sequence[torch.Tensor], limit: float = math.inf) -> float:
    """The largest value of all tables, so that they can have one scale, up to `limit`."""
    return min(max(float(table.nan_to_num().max()) for table in tables), limit)


def spread_over(layers: Sequence[LayerStatistics], count: int) -> list[LayerStatistics]:
    """At most `count` layers, evenly spread from the first to the last."""
    if len(layers) <= count:
        return list(layers)
    return [layers[round(place * (len(layers) - 1) / (count - 1))] for place in range(count)]


def _panels(
    panels: Sequence[tuple[str, torch.Tensor]], row_labels: list[str] | None, title: str, centre: float | None
) -> Figure:
    # Four are a square, and not three and one.
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.9 + min(0.26 * panels[0][1].shape[0], 5)
    figure = Figure(figsize=(max(4.2 * columns, 6), 0.5 + height * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    largest = largest_of([values for _, values in panels], LARGEST_LIFT if centre is not None else math.inf)
    for axes, (name, values) in zip(grid, panels, strict=False):
        labels = row_labels or _numbers(values.shape[0])
        heat_map(axes, values, labels, _numbers(values.shape[1]), title=name, centre=centre, largest=largest)
        axes.set_xlabel("expert", fontsize=7)
        axes.set_ylabel("expert" if row_labels is None else "layer", fontsize=7)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=10)
    return figure


def _bars(axes: Axes, values: Sequence[float], labels: Sequence[str], title: str, color: str) -> None:
    places = range(len(values))
    axes.barh(places, values, color=color, height=0.7)
    step = -(-len(labels) // (2 * LARGEST_LABELLED))
    axes.set_yticks(places[::step], labels[::step])
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(values) <= LARGEST_LABELLED:
        for place, value in enumerate(values):
            # Within its bar, or behind one that is too short.
            is_short = value <= 0.3 * max(values)
            at, ink = (value, color) if is_short else (0, "white")
            axes.annotate(f" {value:.2f}", (at, place), va="center", fontsize=7, color=ink)


def _numbers(count: int) -> list[str]:
    return list(map(str, range(count)))


def _save(figure: Figure, path: str | os.PathLike) -> Path:
    figure.savefig(path, dpi=DPI, format="png")
    return Path(path)
