"""A routing report as a folder: figures, pictures, and one page that shows all of it without a network."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from moe_hf import __version__
from moe_hf.reporting.plots import (
    LARGEST_LIFT,
    cell_scale,
    choices_of_groups,
    filled_table,
    largest_of,
    plot_co_activation,
    plot_groups,
    plot_routing,
    plot_table,
    spread_over,
)
from moe_hf.reporting.statistics import (
    JSON_NAME,
    LARGEST_PAIR_TABLE,
    PAGE_NAME,
    PICTURE_NAME,
    SATURATED_SHARE,
    RoutingStatistics,
    figure_text,
    group_lift,
    specialisation,
)
from moe_hf.reporting.verdict import THRESHOLDS, verdict
from moe_hf.resources import resource_path


# Cells of wider tables have colours and no numbers.
WIDEST_NUMBERED = 16
# Layers whose table of pairs the page shows.
SHOWN_LAYERS = 12
LAYER_COLUMNS = (
    "layer",
    "experts",
    "MaxVio",
    "entropy / ln E",
    "top-1",
    "active",
    "dropped",
    "dead",
    "saturated",
)
RED, BLUE = (178, 24, 43), (33, 102, 172)


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: what it says, its background, its ink, and what it says when pointed at."""

    text: str
    background: str
    ink: str
    hint: str


@dataclass(frozen=True)
class HeatMap:
    """A table of the page: a title over labelled rows of cells."""

    title: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[Cell]]]


def write_report(statistics: RoutingStatistics, folder: str | Path, *, title: str | None = None) -> list[Path]:
    """Write `routing.json`, `report.html` and the PNG files of a report into a folder that exists.

    The page holds all that it shows: it loads nothing, so it can be mailed or put beside a model. Whatever comes from the
    data or the tokenizer is escaped.

    Args:
        statistics (`RoutingStatistics`): from [`routing_statistics`].
        folder (`str` or `Path`): written into.
        title (`str`, *optional*): of the page; the model's name by default.

    Returns:
        `list[Path]` of the files.
    """
    folder = Path(folder)
    statistics.save(folder / JSON_NAME)
    (folder / PAGE_NAME).write_text(report_page(statistics, title=title), encoding="utf-8")
    files = [folder / JSON_NAME, folder / PAGE_NAME]
    files.append(plot_routing(statistics, folder / PICTURE_NAME, title=title or "Routing"))
    for kind, names in statistics.groups.items():
        if len(names) > 1:
            files.append(plot_groups(statistics, kind, folder / f"by_{kind.replace(' ', '_')}.png"))
    if any(layer.mean_active > 1 for layer in statistics.layers):
        files.append(plot_co_activation(statistics, folder / "co_activation.png"))
    if statistics.changes:
        kept = [change.kept for change in statistics.changes]
        files.append(plot_table(statistics, kept, folder / "change.png", title="share of tokens kept by each expert"))
    if statistics.drift:
        drift_title = "distance of each expert from how it was made, relative"
        files.append(plot_table(statistics, statistics.drift, folder / "drift.png", title=drift_title))
    return files


def _tiles(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Figures with their names; what only tells how to read the one before it stands in its name."""
    tiles: list[tuple[str, str]] = []
    for name, value in summary.items():
        of_previous = "chance" if name.endswith(", chance") else "layer" if name == "worst layer" else None
        if of_previous is None:
            tiles.append((name, figure_text(value)))
        else:
            tiles[-1] = (f"{tiles[-1][0]} ({of_previous} {figure_text(value)})", tiles[-1][1])
    return tiles


def report_page(statistics: RoutingStatistics, *, title: str | None = None) -> str:
    """The HTML page of a report, one file without links to others."""
    # Everything is escaped, text of tokens too; nothing on the page is marked as safe.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    template = environment.from_string(resource_path("reporting/report.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        title=title or statistics.model,
        statistics=statistics,
        verdict=verdict(statistics),
        thresholds=THRESHOLDS,
        tiles=_tiles(statistics.summary()),
        load=_by_layer(
            "load: choices over an even share", statistics, [layer.load for layer in statistics.layers], 1.0
        ),
        layer_columns=LAYER_COLUMNS,
        layer_rows=layer_rows(statistics),
        groups=_groups(statistics),
        pairs=_pairs(statistics),
        changes=_changes(statistics),
        drift=_by_layer("distance from the start, relative", statistics, statistics.drift, None)
        if statistics.drift
        else None,
        samples=_samples(statistics),
        saturated_share=f"{SATURATED_SHARE:.0%}",
        version=__version__,
    )


def layer_rows(statistics: RoutingStatistics) -> list[tuple[str, ...]]:
    """One row of figures per layer, in the columns of `LAYER_COLUMNS`, for the page and the terminal."""
    return [
        (
            layer.label,
            str(layer.num_experts),
            f"{layer.max_violation:.3f}",
            f"{layer.relative_entropy:.3f}",
            f"{layer.top_1_probability:.3f}",
            f"{layer.mean_active:.2f}",
            f"{layer.dropped_share:.1%}",
            _ids(layer.dead),
            _ids(layer.saturated),
        )
        for layer in statistics.layers
    ]


def _ids(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:8]))
    return f"{shown}, ... ({len(experts)})" if len(experts) > 8 else shown or "none"


def _colour(value: float, centre: float | None, largest: float) -> tuple[str, str]:
    """Background and ink: white at the centre (or 0), red above, blue below."""
    if value != value:
        return "#f4f4f4", "#999"
    start = centre or 0.0
    above = value >= start
    strength = (value - start) / max(largest - start, 1e-12) if above else (start - value) / start
    target = RED if above and centre is not None else BLUE
    mixed = [round(255 + min(max(strength, 0.0), 1.0) * (channel - 255)) for channel in target]
    return "#{:02x}{:02x}{:02x}".format(*mixed), "#fff" if strength > 0.55 else "#111"


def _heat_map(
    title: str,
    corner: str,
    values: torch.Tensor,
    row_names: list[str],
    centre: float | None,
    largest: float | None = None,
) -> HeatMap:
    largest = largest_of([values]) if largest is None else largest
    largest = largest if centre is None else max(largest, 2 * centre)
    unit, decimals, words = cell_scale(largest) if centre is None else (1.0, 2, "")
    title = ", ".join(filter(None, (title, words)))
    numbered = values.shape[1] <= WIDEST_NUMBERED
    rows = []
    for name, line in zip(row_names, values.tolist(), strict=True):
        cells = []
        for expert, value in enumerate(line):
            text = "" if value != value else f"{value / unit:.{decimals}f}"
            background, ink = _colour(value, centre, largest)
            cells.append(
                Cell(text if numbered else "", background, ink, f"{corner} {name}, expert {expert}: {value:.3g}")
            )
        rows.append((name, cells))
    return HeatMap(title, corner, [str(expert) for expert in range(values.shape[1])], rows)


def _by_layer(
    title: str, statistics: RoutingStatistics, rows: Any, centre: float | None, largest: float | None = None
) -> HeatMap:
    labels = [layer.label for layer in statistics.layers]
    return _heat_map(title, "layer", filled_table(list(rows)), labels, centre, largest)


def _groups(statistics: RoutingStatistics) -> list[dict[str, Any]]:
    """For each kind with several groups: its figures by layer, and a heat map per group."""
    found = []
    for kind, names in statistics.groups.items():
        if len(names) < 2:
            continue
        tables = [layer.groups[kind] for layer in statistics.layers]
        lifts = [group_lift(table) for table in tables]
        figures = [specialisation(table) for table in tables]
        largest, counts = largest_of(lifts, LARGEST_LIFT), choices_of_groups(statistics, kind).tolist()
        found.append(
            {
                "kind": kind,
                "figures": [
                    (layer.label, f"{one['share']:.4f}", f"{one['chance']:.4f}")
                    for layer, one in zip(statistics.layers, figures, strict=True)
                ],
                "maps": [
                    _by_layer(f"{name} ({count:,} choices)", statistics, [lift[group] for lift in lifts], 1.0, largest)
                    for group, (name, count) in enumerate(zip(names, counts, strict=True))
                ],
            }
        )
    return found


def _pairs(statistics: RoutingStatistics) -> list[HeatMap]:
    shown = [
        (layer, layer.co_activation().fill_diagonal_(torch.nan))
        for layer in spread_over(statistics.layers, SHOWN_LAYERS)
        if layer.mean_active > 1 and layer.num_experts <= LARGEST_PAIR_TABLE
    ]
    largest = largest_of([share for _, share in shown]) if shown else None
    return [
        _heat_map(f"layer {layer.label}", "expert", share, list(map(str, range(len(share)))), None, largest)
        for layer, share in shown
    ]


def _changes(statistics: RoutingStatistics) -> dict[str, Any] | None:
    if not statistics.changes:
        return None
    rows = [
        (layer.label, f"{change.overlap:.4f}", f"{change.same_set:.4f}", f"{change.same_first:.4f}")
        for layer, change in zip(statistics.layers, statistics.changes, strict=True)
    ]
    kept = [change.kept for change in statistics.changes]
    return {"rows": rows, "map": _by_layer("share of its tokens that an expert keeps", statistics, kept, None)}


def _samples(statistics: RoutingStatistics) -> list[tuple[str, list[tuple[str, str]]]]:
    """By domain: the text of each token, and its experts by layer, such as "3 0 -1"."""
    found = []
    for sample in statistics.samples:
        texts = sample.tokens or [f"{token_id} " for token_id in sample.token_ids]
        experts = [" ".join(map(str, column)) for column in sample.experts.T.tolist()]
        found.append((sample.domain, list(zip(texts, experts, strict=True))))
    return found
