"""What the study of routers found: one table and one picture, each router beside plain top-k of the same seed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.intervals import paired, spread
from benchmarks.router_arms import REFERENCE


COLUMNS = (
    ("parameters", "parameters"),
    ("FLOPs", "active FLOPs per token over those of plain top-k, with the experts that it used"),
    ("start", "held-out loss before the first step"),
    ("loss", "held-out loss after the last one, mean (standard deviation) over seeds"),
    ("minus plain top-k", "mean of the differences within a seed [95% interval, Student's t]"),
    ("load CV", "of the tokens per expert of a layer, over the last quarter of the training"),
    ("MaxVio", "the busiest expert of a layer over the mean one, minus 1, over the same steps"),
    ("dropped", "share of the choices that found their expert full"),
    ("unserved", "share of the tokens that no expert served"),
    ("experts", "that compute, per token; a merged one counts as one and its merging as what it costs"),
    ("CPU time", "of a training step over one of plain top-k, in turns in one process"),
    ("router moved", "change of the router's parameters over their size, both as norms; routers have no weight decay"),
    (
        "differs: rule",
        "from plain top-k by the highest logits of its own router, on the same hidden states: the share of the choices "
        "that only one of both makes",
    ),
    (
        "differs: trained",
        "the same, from what the trained plain router of the same seed chooses for these hidden states",
    ),
)


def values(arm: dict[str, Any], get: Callable[[dict[str, Any]], float | None]) -> list[float] | None:
    """One number per seed; None where the runs do not have it."""
    found = [get(run) for run in arm["runs"]]
    return None if None in found else found


def loss_at(arm: dict[str, Any], point: int) -> list[float]:
    """The held-out loss of each seed at a point of its curve, in nats/token."""
    return [run["points"][point]["loss"]["all"] for run in arm["runs"]]


def difference(arm: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The spread of the last loss minus that of plain top-k, seed by seed."""
    return paired(loss_at(arm, -1), loss_at(reference, -1))


def ratio(arm: dict[str, Any], reference: dict[str, Any], key: str) -> float:
    """The mean of `key` over that of the reference."""
    return spread([run[key] for run in arm["runs"]])["mean"] / spread([run[key] for run in reference["runs"]])["mean"]


def name_of(arm: dict[str, Any]) -> str:
    """Its title, and a mark where its loss as a language model means nothing."""
    return arm["title"] if arm["runs"][0]["is_causal"] else f"{arm['title']} (not causal)"


def markdown_table(results: dict[str, Any]) -> str:
    """One table, and what its columns are."""
    arms, settings = results["arms"], results["settings"]
    lines = [
        f"Routers after {settings['steps']} steps of {settings['batch_size'] * settings['block_size']:,} tokens, upcycled "
        f"from one dense model per seed; {settings['seeds']} seed(s), losses in nats/token.",
        "",
        "| router | " + " | ".join(name for name, _ in COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    lines += [f"| {name_of(arm)} | " + " | ".join(_cells(arm, arms[REFERENCE])) + " |" for arm in arms.values()]
    lines += ["", *(f"- {name}: {meaning}" for name, meaning in COLUMNS)]
    return "\n".join(lines) + "\n"


def _cells(arm: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    last, apart = spread(loss_at(arm, -1)), difference(arm, reference)
    deviation, interval = "", ""
    if len(arm["runs"]) > 1:
        deviation = f" ({last['std']:.3f})"
        low, high = apart["mean"] - apart["interval_95"], apart["mean"] + apart["interval_95"]
        interval = f" [{low:+.3f}, {high:+.3f}]"

    def routing(key: str, form: str) -> str:
        found = values(arm, lambda run: run.get("routing", {}).get(key))
        return "" if found is None else format(spread(found)["mean"], form)

    def differs(key: str) -> str:
        found = values(arm, lambda run: run.get("differs", {}).get(key))
        return "" if found is None else f"{spread(found)['mean']:.2f}"

    moved = values(arm, lambda run: run.get("router_change", {}).get("relative"))
    return [
        f"{arm['runs'][0]['parameters'] / 1e6:.2f} M",
        f"{ratio(arm, reference, 'flops_per_token'):.2f}",
        f"{spread(loss_at(arm, 0))['mean']:.3f}",
        f"{last['mean']:.3f}{deviation}",
        "" if arm is reference else f"{apart['mean']:+.3f}{interval}",
        routing("load_cv", ".2f"),
        routing("max_violation", ".2f"),
        routing("dropped_share", ".1%"),
        routing("unserved_share", ".1%"),
        routing("experts_per_token", ".2f"),
        f"{spread([run['time_ratio'] for run in arm['runs']])['mean']:.2f}",
        "" if moved is None else f"{spread(moved)['mean']:.2f}",
        differs("rule"),
        differs("trained"),
    ]


def routers_plot(results: dict[str, Any], path: Path) -> None:
    """Routers from the lowest loss to the highest, those that are not causal below: loss, load, and what they cost."""
    arms = results["arms"]
    reference = arms[REFERENCE]
    apart = {name: difference(arm, reference) for name, arm in arms.items()}
    order = sorted(arms, key=lambda name: (not arms[name]["runs"][0]["is_causal"], apart[name]["mean"]))
    figure, (losses, loads, costs) = plt.subplots(
        1, 3, figsize=(14, 1.2 + 0.27 * len(order)), sharey=True, constrained_layout=True, width_ratios=(2, 1.2, 1.2)
    )
    _draw_differences(losses, [apart[name] for name in order])
    for place, name in enumerate(order):
        arm = arms[name]
        for key, mark, color in (("max_violation", "o", "C0"), ("load_cv", "d", "C1")):
            found = values(arm, lambda run, key=key: run.get("routing", {}).get(key))
            if found is not None:
                loads.plot(spread(found)["mean"], place, mark, color=color)
        costs.plot(ratio(arm, reference, "flops_per_token"), place, "d", color="C1")
        costs.plot(spread([run["time_ratio"] for run in arm["runs"]])["mean"], place, "o", color="C0")
    losses.set_yticks(range(len(order)), [name_of(arms[name]) for name in order])
    losses.set_xlabel("held-out loss minus plain top-k, nats/token\ndots: seeds; bars: 95% interval of the mean")
    loads.set_xlabel("load: MaxVio (dots), CV (diamonds)")
    costs.set_xlabel("over plain top-k: CPU time (dots),\nactive FLOPs (diamonds)")
    costs.axvline(1, color="grey", linewidth=0.8)
    costs.set_xscale("log", base=2)
    costs.xaxis.set_major_formatter("{x:g}")
    losses.set_ylim(len(order) - 0.5, -0.5)
    first_not_causal = next((i for i, name in enumerate(order) if not arms[name]["runs"][0]["is_causal"]), None)
    for panel in (losses, loads, costs):
        panel.grid(alpha=0.3)
        if first_not_causal is not None:
            panel.axhspan(first_not_causal - 0.5, len(order) - 0.5, color="grey", alpha=0.15)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_differences(panel: plt.Axes, found: list[dict[str, Any]]) -> None:
    """The differences of each row; those far to the right are named at the edge, so that the others can be told apart."""
    middle = sorted(value["mean"] for value in found)[len(found) // 2]
    width = max(0.02, 3 * (middle - min(value["mean"] for value in found)), 3 * middle)
    edge = middle + width
    shown = [seed for value in found if value["mean"] <= edge for seed in value["per_seed"]]
    panel.set_xlim(min(shown) - 0.1 * width, min(edge, max(shown)) + 0.2 * width)
    panel.axvline(0, color="grey", linewidth=0.8)
    right = panel.get_xlim()[1]
    for place, value in enumerate(found):
        if value["mean"] > edge:
            panel.annotate(
                f"{value['mean']:+.2f} >", (right, place), ha="right", va="center", fontsize="small", color="C3"
            )
            continue
        # Red where the interval leaves out 0; a single seed has none.
        color = "C3" if abs(value["mean"]) > value["interval_95"] > 0 else "C0"
        if len(value["per_seed"]) > 1:
            panel.errorbar(value["mean"], place, xerr=value["interval_95"], color=color, alpha=0.4, linewidth=4)
        panel.plot(value["per_seed"], [place] * len(value["per_seed"]), ".", color=color)
