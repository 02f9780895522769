"""What the study of initialisers found: means and spreads over seeds, paired differences, a table and a picture."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.intervals import difference_text, draw_band, paired, spread, value_text


# Whose loss is subtracted, seed by seed, from an arm's at the same share of its steps.
CONTROLS = ("copy", "dense", "dense_equal_flops")
SHARES_IN_TABLE = (0.0, 0.25, 0.5, 1.0)


def losses(arm: dict[str, Any]) -> list[list[float]]:
    """Held-out loss of each run at each point, in nats/token."""
    return [[point["loss"]["all"] for point in run["points"]] for run in arm["runs"]]


def summary(arms: dict[str, Any]) -> dict[str, Any]:
    """Per arm the spread of its loss at each point, and of its difference to each control that was run."""
    result = {}
    for name, arm in arms.items():
        ours = losses(arm)
        result[name] = {"loss": [spread(list(values)) for values in zip(*ours, strict=True)], "minus": {}}
        for control in CONTROLS:
            if control not in arms or control == name:
                continue
            places = zip(zip(*ours, strict=True), zip(*losses(arms[control]), strict=True), strict=True)
            result[name]["minus"][control] = [paired(list(a), list(b)) for a, b in places]
    return result


def markdown_table(results: dict[str, Any]) -> str:
    """Two tables: the losses along the runs, and the paired differences at their ends."""
    arms, found = results["arms"], summary(results["arms"])
    seeds = results["settings"]["seeds"]
    lines = [
        f"Held-out loss in nats/token, mean (standard deviation) over {seeds} seed(s), at shares of each arm's steps.",
        "",
        "| arm | parameters | training FLOPs | tokens | " + " | ".join(f"{s:.0%}" for s in SHARES_IN_TABLE) + " |",
        "|---|" + "---|" * (3 + len(SHARES_IN_TABLE)),
    ]
    for name, arm in arms.items():
        run = arm["runs"][0]
        last, curve = run["points"][-1], found[name]["loss"]
        places = [curve[round(share * (len(curve) - 1))] for share in SHARES_IN_TABLE]
        cells = [f"{run['parameters'] / 1e6:.2f} M", f"{last['training_flops']:.2e}", f"{last['tokens']:,}"]
        cells += [value_text(place) for place in places]
        lines.append(f"| {arm['title']} | " + " | ".join(cells) + " |")
    controls = [name for name in CONTROLS if name in arms]
    if not controls:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "Difference at the end, within each seed: mean (standard deviation) [95% interval of the mean, Student's t].",
        "",
        "| arm | " + " | ".join(f"minus {arms[name]['title']}" for name in controls) + " |",
        "|---|" + "---|" * len(controls),
    ]
    for name, arm in arms.items():
        cells = [difference_text(found[name]["minus"][control][-1]) if control != name else "" for control in controls]
        lines.append(f"| {arm['title']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def curves_plot(arms: dict[str, Any], path: Path) -> None:
    """Loss, and its difference to the continued dense model, against tokens and against active training FLOPs.

    Lines are means over seeds, bands one standard deviation to each side; of the differences the deviation is that of
    the differences within a seed. What lies far above the rest is left out, and its end named in the legend.
    """
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), sharex="col", sharey="row", constrained_layout=True)
    columns = (("tokens", "dense", "tokens"), ("training_flops", "dense_equal_flops", "active training FLOPs"))
    for (upper, lower), (key, control, label) in zip(axes.T, columns, strict=True):
        other = {"dense", "dense_equal_flops"} - {control}
        for number, arm in enumerate(arm for name, arm in arms.items() if name not in other):
            at = [point[key] for point in arm["runs"][0]["points"]]
            draw_band(upper, at, losses(arm), color=f"C{number}", label=arm["title"])
            if control in arms:
                pairs = zip(losses(arm), losses(arms[control]), strict=True)
                differences = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
                draw_band(lower, at, differences, color=f"C{number}", label=arm["title"])
        lower.set_xlabel(label)
    for row, label in zip(axes, ("held-out loss, nats/token", "minus continued dense, nats/token"), strict=True):
        row[0].set_ylabel(label)
        lines = [line.get_ydata() for panel in row for line in panel.lines]
        if not lines:  # no continued dense model was run
            continue
        low, high = _limits(lines)
        row[0].set_ylim(low, high)
        for panel in row:
            panel.grid(alpha=0.3)
            for line in panel.lines:
                if min(line.get_ydata()) > high:
                    line.set_label(f"{line.get_label()} (outside, ends at {line.get_ydata()[-1]:.2f})")
    for panel in axes[0]:
        panel.legend(fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _limits(lines: list[list[float]]) -> tuple[float, float]:
    """Limits of an axis that show the last three quarters of every line but those that end far above the median one."""
    ends = sorted(line[-1] for line in lines)
    middle = ends[len(ends) // 2]
    width = max(middle - ends[0], 1e-3)
    shown = [line for line in lines if line[-1] <= middle + 5 * width]
    low, high = min(map(min, shown)), max(max(line[len(line) // 4 :]) for line in shown)
    return low - 0.1 * (high - low), high + 0.2 * (high - low)
