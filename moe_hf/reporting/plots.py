"""Pictures of routing: heat maps of how the experts share the tokens.

Letters: L MoE layers, E experts, N domains.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from moe_hf.reporting.routing_counts import RoutingCounts


def heat_map(
    axes: Axes,
    values: torch.Tensor,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    *,
    title: str,
    centre: float = 1.0,
    show_values: bool = True,
) -> None:
    """Draw a matrix of loads onto `axes`, white where the load is `centre`, with its colour bar.

    Args:
        values (`torch.Tensor`): (rows, columns).
    """
    highest = max(float(values.max()), 2 * centre)
    image = axes.imshow(values.numpy(), cmap="RdBu_r", norm=TwoSlopeNorm(centre, 0.0, highest), aspect="auto")
    axes.set_xticks(range(len(column_labels)), column_labels)
    axes.set_yticks(range(len(row_labels)), row_labels)
    axes.set_title(title, fontsize=10)
    if show_values:
        for row, line in enumerate(values.tolist()):
            for column, value in enumerate(line):
                dark = value < 0.3 * centre or value > centre + 0.6 * (highest - centre)
                color = "white" if dark else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=color)
    axes.figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)


def plot_routing(counts: RoutingCounts, path: str | os.PathLike, *, title: str = "Routing on held-out text") -> Path:
    """Write a PNG with the load of each expert by layer, and by domain; 1 is an even share, whatever the domain's size.

    Args:
        counts (`RoutingCounts`): from `count_routing`.
        path (`str` or `os.PathLike`): the picture; its folder exists.

    Returns:
        `pathlib.Path` of the picture.
    """
    num_domains, num_layers, num_experts = counts.counts.shape
    layers = [f"layer {index}" for index in range(num_layers)]
    experts = [str(expert) for expert in range(num_experts)]
    pairs = [f"{layer}.{expert}" for layer in range(num_layers) for expert in range(num_experts)]
    height = 2.6 + 0.32 * (num_layers + num_domains)
    figure = Figure(figsize=(max(9.0, 0.34 * len(pairs) + 2), height), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[num_layers + 1, num_domains + 1])
    heat_map(top, counts.load(), layers, experts, title="load by layer and expert (1 = even share)")
    top.set_xlabel("expert")
    by_domain = counts.load_by_domain().flatten(1)  # (N, L * E)
    heat_map(
        bottom,
        by_domain,
        counts.domains,
        pairs,
        title="load by domain and expert (1 = even share)",
        show_values=len(pairs) <= 64,
    )
    bottom.set_xlabel("layer.expert")
    bottom.tick_params(axis="x", labelsize=6, rotation=90)
    figure.suptitle(title)
    figure.savefig(path, dpi=150, format="png")
    return Path(path)
