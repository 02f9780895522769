"""What the study of MoEs against dense models found: costs at equal loss, losses at equal cost, a table, a picture.

A curve is (costs, losses), both of the points of one run; costs are training FLOPs, CPU seconds or tokens.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator

from benchmarks.intervals import difference_text, draw_band, paired, ratio_spread, ratio_text, spread, value_text


Curve = tuple[np.ndarray, np.ndarray]


def falling(losses: np.ndarray) -> np.ndarray:
    """The falling sequence nearest to `losses` in squares: pools of neighbours that rise (isotonic regression).

    A constant learning rate makes a curve jump from point to point; the first dip below a target would flatter it.
    """
    pools: list[list[float]] = []  # mean and count
    for loss in losses:
        pools.append([float(loss), 1])
        while len(pools) > 1 and pools[-2][0] <= pools[-1][0]:
            (mean_a, a), (mean_b, b) = pools[-2:]
            pools[-2:] = [[(mean_a * a + mean_b * b) / (a + b), a + b]]
    return np.concatenate([np.full(count, mean) for mean, count in pools])


def loss_at(curve: Curve, cost: float) -> float | None:
    """The loss at a cost, between points on a line over the logarithm of the cost; None beyond the curve."""
    costs, losses = curve
    if not costs[0] <= cost <= costs[-1] * (1 + 1e-9):
        return None
    return float(np.interp(np.log(cost), np.log(costs), falling(losses)))


def cost_to_reach(curve: Curve, loss: float) -> float | None:
    """The cost at which a curve has come down to a loss; None where it does not, or was there at its first point."""
    costs, losses = curve[0], falling(curve[1])
    if losses[-1] > loss or losses[0] < loss:
        return None
    after = int(np.argmax(losses <= loss))
    if losses[after] == loss or after == 0:
        return float(costs[after])
    share = (losses[after - 1] - loss) / (losses[after - 1] - losses[after])
    return float(np.exp(np.log(costs[after - 1]) + share * (np.log(costs[after]) - np.log(costs[after - 1]))))


def curve(arm: dict[str, Any], seed: int, cost: str) -> Curve:
    """One run's curve over `training_flops`, `tokens` or `seconds`, without the point before the first step."""
    points = [point for point in arm["runs"][seed]["points"] if point["step"] > 0]
    costs = [point["step"] * arm["step_seconds"] if cost == "seconds" else point[cost] for point in points]
    return np.array(costs, dtype=float), np.array([point["loss"]["all"] for point in points])


def comparison(ours: list[Curve], theirs: list[Curve], budgets: list[float]) -> dict[str, Any]:
    """One MoE beside one control at equal budgets, a curve of each and a budget per seed.

    Returns:
        `difference`: our loss minus theirs at the budget, spread over seeds. `share`: our cost to their loss there, over
        the budget, and `reached`: in how many seeds there was one. `their_share`: their cost to our loss there, over the
        budget, None unless it was reached with each seed; so is `share`. None for all where a curve ends before the budget.
    """
    losses = [(loss_at(a, cost), loss_at(b, cost)) for a, b, cost in zip(ours, theirs, budgets, strict=True)]
    if any(loss is None for pair in losses for loss in pair):
        return {"difference": None, "share": None, "reached": 0, "their_share": None}
    shares = [cost_to_reach(a, pair[1]) for a, pair in zip(ours, losses, strict=True)]
    theirs_shares = [cost_to_reach(b, pair[0]) for b, pair in zip(theirs, losses, strict=True)]
    return {
        "difference": paired(*([pair[side] for pair in losses] for side in (0, 1))),
        "share": _ratios(shares, budgets),
        "reached": sum(share is not None for share in shares),
        "their_share": _ratios(theirs_shares, budgets),
    }


def _ratios(costs: list[float | None], budgets: list[float]) -> dict[str, Any] | None:
    if any(cost is None for cost in costs):
        return None
    return ratio_spread([cost / budget for cost, budget in zip(costs, budgets, strict=True)])


def comparisons(results: dict[str, Any]) -> dict[int, dict[str, dict[str, Any]]]:
    """Each MoE, by its number of experts, beside its controls.

    `equal_flops`: the dense model after as many training FLOPs as it has when all arms' steps are over. `equal_size`: a
    dense model with the MoE's parameters, at the same FLOPs; `equal_tokens`: the same at the MoE's tokens, where it has
    come so far. `equal_time`: the dense model after the CPU time of the MoE's whole run.
    """
    arms, settings = results["arms"], results["settings"]
    tokens = settings["steps"] * settings["batch_size"] * settings["block_size"]
    flops = tokens * arms["dense"]["training_flops_per_token"]
    found = {}
    for experts in settings["experts"]:
        moe, wide = arms[f"moe_{experts}"], arms[f"wide_{experts}"]
        seconds = settings["steps"] * moe["step_seconds"]
        found[experts] = {
            name: comparison(
                *([curve(arm, seed, cost) for seed in range(settings["seeds"])] for arm in (moe, control)),
                [budget] * settings["seeds"],
            )
            for name, control, cost, budget in (
                ("equal_flops", arms["dense"], "training_flops", flops),
                ("equal_size", wide, "training_flops", flops),
                ("equal_tokens", wide, "tokens", tokens),
                ("equal_time", arms["dense"], "seconds", seconds),
            )
        }
    return found


def _share_text(found: dict[str, Any], seeds: int) -> str:
    if found["difference"] is None:
        return "control not run so far"
    if found["share"] is None:
        return f"reached in {found['reached']} of {seeds}"
    return ratio_text(found["share"])


def markdown_table(results: dict[str, Any]) -> str:
    """Tables: the arms at their ends, each MoE beside its controls, and how learning rates were chosen."""
    arms, settings, found = results["arms"], results["settings"], comparisons(results)
    seeds, dense = settings["seeds"], arms["dense"]
    lines = [
        f"Held-out loss in nats/token at the end of each run, mean (standard deviation) over {seeds} seed(s).",
        "",
        "| arm | parameters | FLOPs per token | CPU time of a step | steps | training FLOPs | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        last = arm["runs"][0]["points"][-1]
        cells = [
            f"{arm['parameters']:,}",
            f"{arm['forward_flops_per_token'] / dense['forward_flops_per_token']:.2f}",
            f"{arm['step_seconds'] / dense['step_seconds']:.2f} ({1000 * arm['step_seconds']:.0f} ms)",
            f"{last['step']:,}",
            f"{last['training_flops']:.2e}",
            value_text(spread([run["points"][-1]["loss"]["all"] for run in arm["runs"]])),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    titles = {
        "equal_flops": "dense, equal active FLOPs",
        "equal_size": "dense, equal parameters, equal FLOPs",
        "equal_tokens": "dense, equal parameters, equal tokens",
        "equal_time": "dense, equal CPU time",
    }
    lines += [
        "",
        "Each MoE beside its control, within each seed, with 95% intervals (Student's t). Loss of the MoE minus the "
        "control's at the budget; the MoE's cost to the control's loss there, over the budget (below 1: the MoE is "
        "cheaper), and the control's cost to the MoE's loss (above 1: the MoE is cheaper), as geometric means.",
        "",
        "| experts | control | loss, minus the control's | MoE's cost to the control's loss | control's to the MoE's |",
        "|---|---|---|---|---|",
    ]
    for experts, controls in found.items():
        for name, title in titles.items():
            value = controls[name]
            difference = "" if value["difference"] is None else difference_text(value["difference"], 3)
            theirs = "" if value["their_share"] is None else ratio_text(value["their_share"])
            lines.append(f"| {experts} | {title} | {difference} | {_share_text(value, seeds)} | {theirs} |")
    lines += ["", "Learning rates, by validation loss with seed 0:", ""]
    for rate in results["rates"].values():
        tried = ", ".join(f"{name}: {loss:.3f}" for name, loss in rate["validation"].items())
        lines.append(
            f"- {rate['kind']} (tried on {rate['arm']}, {rate['steps']} steps): {rate['chosen']}; tried {tried}"
        )
    return "\n".join(lines) + "\n"


def curves_plot(results: dict[str, Any], path: Path) -> None:
    """Loss against FLOPs, tokens and CPU time; and the MoEs' cost to their controls' loss against the experts.

    Lines are means over seeds, bands one standard deviation to each side; whiskers are 95% intervals.
    """
    arms = results["arms"]
    figure, axes = plt.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    panels = (
        ("training_flops", "training FLOPs", ("dense", "moe", "wide")),
        ("tokens", "tokens", ("dense", "moe", "wide")),
        ("seconds", "CPU seconds, one thread", ("dense", "moe")),
    )
    colors = {experts: f"C{number}" for number, experts in enumerate(results["settings"]["experts"])}
    for panel, (cost, label, kinds) in zip(axes.flat, panels, strict=False):
        for name, arm in arms.items():
            kind, _, experts = name.partition("_")
            if kind not in kinds:
                continue
            curves = [curve(arm, seed, cost) for seed in range(len(arm["runs"]))]
            title = {"dense": "dense", "moe": f"{experts} experts", "wide": f"dense, size of {experts} experts"}[kind]
            style = {"linestyle": "--", "linewidth": 1} if kind == "wide" else {"linewidth": 2}
            color = "black" if kind == "dense" else colors[int(experts)]
            draw_band(panel, list(curves[0][0]), [list(c[1]) for c in curves], color=color, label=title, **style)
        panel.set(xlabel=label, xscale="log", ylabel="held-out loss, nats/token")
        ends = [line.get_ydata()[-1] for line in panel.lines]
        panel.set_ylim(min(ends) - 0.05, max(ends) + 0.8)
        shown = [x for line in panel.lines for x, y in zip(*line.get_data(), strict=True) if y <= max(ends) + 0.8]
        panel.set_xlim(0.9 * min(shown), 1.1 * max(shown))
        panel.grid(alpha=0.3, which="both")
    axes[1, 0].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[1, 0].xaxis.set_major_formatter("{x:g}")
    axes[1, 0].xaxis.set_minor_formatter("")
    axes[0, 0].legend(fontsize="small", ncols=2)
    _shares_panel(axes[1, 1], comparisons(results))
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _shares_panel(panel: plt.Axes, found: dict[int, dict[str, dict[str, Any]]]) -> None:
    names = {
        "equal_flops": "equal active FLOPs",
        "equal_size": "equal parameters, equal FLOPs",
        "equal_time": "equal CPU time",
    }
    for number, (name, title) in enumerate(names.items()):
        known = {e: controls[name]["their_share"] for e, controls in found.items() if controls[name]["their_share"]}
        if known:
            middle = np.array([value["mean"] for value in known.values()])
            ends = np.array([[value["low"], value["high"]] for value in known.values()]).T
            at = np.array(list(known)) * 1.04 ** (number - 1)
            panel.errorbar(at, middle, yerr=np.abs(ends - middle), marker="o", capsize=3, label=title)
    panel.axhline(1, color="black", linewidth=1)
    panel.set(xlabel="experts", xscale="log", ylabel="dense model's cost to the MoE's loss, over the MoE's")
    panel.set_xticks(list(found), [str(experts) for experts in found])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize="small")
