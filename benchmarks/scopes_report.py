"""What the study of scopes found: task loss, gap, forgetting and cost by scope, tables and pictures."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.intervals import difference_text, if_known, interval_text, paired, spread, value_text


# A scope keeps its colour in all panels.
COLORS = {
    "moe": "C0",
    "experts": "C1",
    "router": "C2",
    "shared": "C3",
    "non_moe": "C4",
    "attention": "C5",
    "ffn": "C6",
    "all": "black",
}


def summary(task: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By scope, spreads over seeds of one model and task.

    Returns:
        `loss`: test loss after; `minus_all`: test loss minus that of the scope `all`, within each seed; `gain`: what it fell by, over what it fell by with `all`; `gap`: test
        loss minus the loss of the trained rows; `forgetting`: loss of held-out code after minus before. `before` has
        `loss` and `gap` alone.
    """
    before = task["before"]
    found = {"before": {"loss": spread([run["test"] for run in before]), "gap": _gap(before)}}
    for scope in task:
        if scope == "before":
            continue
        after = [run["after"] for run in task[scope]["runs"]]
        test, all_ = ([run["after"]["test"] for run in task[name]["runs"]] for name in (scope, "all"))
        found[scope] = {
            "loss": spread(test),
            "minus_all": paired(test, all_),
            "gain": spread([(b["test"] - a) / (b["test"] - c) for a, b, c in zip(test, before, all_, strict=True)]),
            "gap": _gap(after),
            "forgetting": paired([run["code"] for run in after], [run["code"] for run in before]),
        }
    return found


def _gap(runs: list[dict[str, float]]) -> dict[str, Any]:
    return paired([run["test"] for run in runs], [run["train"] for run in runs])


def markdown_table(results: dict[str, Any]) -> str:
    """A table per model and task, and the learning rates that were tried."""
    seeds, lines = results["settings"]["seeds"], []
    for model in results["models"].values():
        for name, task in model["tasks"].items():
            lines += [f"### {model['title']}: {name}", "", *_task_table(model, task), ""]
    lines += [
        f"Losses in nats/token, mean (standard deviation) over {seeds} seed(s), differences within each seed with the 95% "
        "interval of their mean (Student's t). Gain: what the test loss fell by, over what it fell by with `all`. Gap: test loss minus that of the trained rows. Forgetting: held-out loss "
        "of the first domain, after minus before. Step: process CPU time, one thread, all scopes in turns.",
        "",
        "Validation loss with seed 0 by learning rate; the best one was used with all seeds:",
        "",
        "| model | task | scope | " + " | ".join(map(str, results["settings"]["learning_rates"])) + " |",
        "|---|---|---|" + "---|" * len(results["settings"]["learning_rates"]),
    ]
    for kind, model in results["models"].items():
        for name, task in model["tasks"].items():
            for scope in task:
                if scope != "before":
                    tried = [f"{losses['validation']:.3f}" for losses in task[scope]["tried"].values()]
                    lines.append(f"| {kind} | {name} | {scope} | " + " | ".join(tried) + " |")
    return "\n".join(lines) + "\n"


def _task_table(model: dict[str, Any], task: dict[str, Any]) -> list[str]:
    found, seconds = summary(task), model["step_seconds"]
    lines = [
        "| scope | trained | rate | test loss | minus all | gain | gap | forgetting | step |",
        "|---|---|---|---|---|---|---|---|---|",
        f"| before | | | {value_text(found['before']['loss'], 3)} | | | {found['before']['gap']['mean']:+.3f} | | |",
    ]
    for scope, same in model["same"].items():
        if scope != same:
            lines.append(f"| {scope} | the same parameters as {same} | | | | | | | |")
            continue
        run, value = task[scope]["runs"][0], found[scope]
        share = run["trained_parameters"] / run["total_parameters"]
        cells = [
            f"{run['trained_parameters']:,} ({share:.1%})",
            f"{task[scope]['rate']:g}",
            value_text(value["loss"], 3),
            "" if scope == "all" else difference_text(value["minus_all"], 3),
            f"{value['gain']['mean']:.0%}",
            value_text(value["gap"], 3),
            f"{value['forgetting']['mean']:+.3f}"
            + if_known(f" {interval_text(value['forgetting'], 3)}", value["forgetting"]),
            f"{seconds[scope] / seconds['all']:.2f} ({1000 * seconds[scope]:.0f} ms)",
        ]
        lines.append(f"| {scope} | " + " | ".join(cells) + " |")
    return lines


def _panels(results: dict[str, Any], **sharing: Any) -> tuple[plt.Figure, list[tuple[plt.Axes, dict[str, Any], str]]]:
    """A figure with a row per task and a column per model; each panel with its model and the task's name."""
    models = results["models"]
    tasks = list(next(iter(models.values()))["tasks"])
    shape = (len(tasks), len(models))
    size = (1.5 + 4.5 * shape[1], 3.6 * shape[0])
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, constrained_layout=True, **sharing)
    panels = []
    for row, task in zip(axes, tasks, strict=True):
        for panel, model in zip(row, models.values(), strict=True):
            panel.set_title(f"{task}\n{model['title']}", fontsize="small")
            panel.grid(alpha=0.3)
            panels.append((panel, model, task))
    return figure, panels


def differences_plot(results: dict[str, Any], path: Path) -> None:
    """Test loss of each scope minus that of `all`: the mean, the 95% interval, and each seed."""
    figure, panels = _panels(results, sharey="row")
    for panel, model, task in panels:
        found = summary(model["tasks"][task])
        names = [scope for scope in found if scope not in ("before", "all")]
        for at, scope in enumerate(names):
            value = found[scope]["minus_all"]
            width = value["interval_95"] if len(value["per_seed"]) > 1 else 0
            panel.errorbar(at, value["mean"], yerr=width, marker="o", capsize=4, color=COLORS[scope])
            panel.plot([at + 0.15] * len(value["per_seed"]), value["per_seed"], ".", color=COLORS[scope], alpha=0.6)
        panel.axhline(0, color="black", linewidth=1)
        panel.set_xticks(range(len(names)), names, rotation=20)
        panel.set_ylabel("test loss minus all, nats/token", fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def forgetting_plot(results: dict[str, Any], path: Path) -> None:
    """Test loss against forgetting: a mean with the standard deviations of both, per scope."""
    figure, panels = _panels(results)
    for panel, model, task in panels:
        for scope, value in summary(model["tasks"][task]).items():
            if scope == "before":
                panel.axhline(value["loss"]["mean"], color="grey", linestyle=":", label="before")
                continue
            x, y = value["forgetting"], value["loss"]
            widths = [np.nan_to_num(part["std"]) for part in (x, y)]
            panel.errorbar(
                x["mean"], y["mean"], xerr=widths[0], yerr=widths[1], marker="o", color=COLORS[scope], label=scope
            )
        panel.set_xlabel("forgetting: loss of held-out code, after minus before", fontsize="small")
        panel.set_ylabel("test loss, nats/token", fontsize="small")
    panels[0][0].legend(fontsize="x-small")
    figure.savefig(path, dpi=90)
    plt.close(figure)
