"""What the study at equal FLOPs found: differences to the dense model by tokens and by time, where they cross, a picture."""

from math import exp, log
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.intervals import difference_text, draw_band, paired, spread, value_text


BYTES_PER_TRAINED = 16  # float32 weight, gradient and both moments of AdamW


def losses(arm: dict[str, Any]) -> np.ndarray:
    """Loss in nats/token at the end of each run, (lengths, seeds)."""
    return np.array([[run["points"][-1]["loss"]["all"] for run in of_length] for of_length in arm["runs"]])


def lengths(results: dict[str, Any]) -> list[int]:
    """Tokens of the runs."""
    return [of_length[0]["tokens"] for of_length in results["arms"]["dense"]["runs"]]


def dense_after(results: dict[str, Any], tokens: float, seed: int) -> float | None:
    """The dense model's loss after some tokens, between runs on a line over the logarithm of tokens; None beyond them."""
    known = lengths(results)
    if not known[0] <= tokens <= known[-1]:
        return None
    return float(np.interp(log(tokens), np.log(known), losses(results["arms"]["dense"])[:, seed]))


def differences(results: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Of an arm, at each length: its loss minus the dense model's at equal tokens, and at equal CPU time."""
    arms = results["arms"]
    ours, theirs = losses(arms[name]), losses(arms["dense"])
    pace = arms[name]["step_seconds"] / arms["dense"]["step_seconds"]
    found = []
    for place, tokens in enumerate(lengths(results)):
        later = [dense_after(results, tokens * pace, seed) for seed in range(ours.shape[1])]
        found.append(
            {
                "tokens": tokens,
                "equal_tokens": paired(list(ours[place]), list(theirs[place])),
                "equal_time": None if None in later else paired(list(ours[place]), later),
            }
        )
    return found


def crossing(results: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Tokens from which on an arm is below the dense model for good, over seeds; None unless each seed crosses.

    Between lengths the difference is on a line over the logarithm of tokens. An arm that is below from the first length
    on does not cross.
    """
    known = np.log(lengths(results))
    gaps = losses(results["arms"][name]) - losses(results["arms"]["dense"])  # (lengths, seeds)
    found = []
    for gap in gaps.T:
        above = np.flatnonzero(gap >= 0)
        if not len(above) or above[-1] + 1 == len(gap):
            return None
        a, b = above[-1], above[-1] + 1
        found.append(float(known[a] + (known[b] - known[a]) * gap[a] / (gap[a] - gap[b])))
    value = spread(found)
    low, high = (value["mean"] + sign * value["interval_95"] for sign in (-1, 1))
    return {"tokens": exp(value["mean"]), "low": exp(low), "high": exp(high), "per_seed": [exp(v) for v in found]}


def _crossing_text(results: dict[str, Any], name: str) -> str:
    found = crossing(results, name)
    if found is not None:
        interval = f" [{found['low']:,.0f}, {found['high']:,.0f}]" if len(found["per_seed"]) > 1 else ""
        return f"{found['tokens']:,.0f}{interval}"
    gaps = losses(results["arms"][name]) - losses(results["arms"]["dense"])
    if (gaps < 0).all():
        return "below from the first length on"
    return "in some seeds only" if (gaps[-1] < 0).any() else "not within these lengths"


def markdown_table(results: dict[str, Any]) -> str:
    """Tables: what arms cost, losses, differences at equal tokens and at equal time; and how rates were chosen."""
    arms, seeds, known = results["arms"], results["settings"]["seeds"], lengths(results)
    moes, dense = [name for name in arms if name != "dense"], arms["dense"]
    columns = " | ".join(f"{tokens:,}" for tokens in known)
    lines = [
        "What arms cost, over the dense model: FLOPs of a token, CPU time of a training step (one thread, arms in turns), and "
        "memory of weights, gradients and AdamW.",
        "",
        "| arm | parameters | FLOPs | time | memory to train | below dense from this number of tokens on |",
        "|---|---|---|---|---|---|",
    ]
    for name, arm in arms.items():
        cells = [f"{arm['parameters'] / 1e6:.2f} M"]
        cells += [f"{arm[key] / dense[key]:.2f}" for key in ("forward_flops_per_token", "step_seconds")]
        cells += [f"{arm['parameters'] * BYTES_PER_TRAINED / 2**20:.0f} MiB"]
        cells += [_crossing_text(results, name) if name in moes else ""]
        lines.append(f"| {arm['title']} | " + " | ".join(cells) + " |")
    header = [f"| arm | {columns} |", "|---|" + "---|" * len(known)]
    lines += [
        "",
        f"Loss in nats/token after some tokens, mean (standard deviation) over {seeds} seed(s).",
        "",
        *header,
    ]
    for arm in arms.values():
        cells = [value_text(spread(list(values))) for values in losses(arm)]
        lines.append(f"| {arm['title']} | " + " | ".join(cells) + " |")
    titles = {
        "equal_tokens": "Minus the dense model after as many tokens, and with them FLOPs (the router's apart)",
        "equal_time": "Minus the dense model after as much CPU time, between its runs",
    }
    for key, title in titles.items():
        lines += [
            "",
            f"{title}: mean (standard deviation) [95% interval, Student's t], within each seed.",
            "",
            *header,
        ]
        for name in moes:
            values = [found[key] for found in differences(results, name)]
            cells = ["" if value is None else difference_text(value) for value in values]
            lines.append(f"| {arms[name]['title']} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_choices(results["choices"])]) + "\n"


def _choices(choices: dict[str, Any]) -> list[str]:
    def text(tried: dict[Any, float | None]) -> str:
        return ", ".join(f"{float(value):g}: {loss:.4f}" for value, loss in tried.items() if loss is not None)

    balance = choices["balance"]
    lines = ["Chosen by the loss on other held-out text, with seed 0:", ""]
    lines.append(f"- weight of the balance loss: {balance['chosen']:g}; tried {text(balance['validation'])}")
    for kind, by_tokens in choices["rates"].items():
        for tokens, rate in by_tokens.items():
            tried = text(rate["validation"])
            lines.append(f"- rate of {kind} for {int(tokens):,} tokens: {rate['chosen']:g}; tried {tried}")
    return lines


def curves_plot(results: dict[str, Any], path: Path) -> None:
    """Loss by tokens and by time; and each MoE minus the dense model, at equal tokens and at equal time.

    Lines are means over seeds, bands one standard deviation to each side.
    """
    arms, known = results["arms"], lengths(results)
    step_tokens = results["settings"]["batch_size"] * results["settings"]["block_size"]
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    for number, (name, arm) in enumerate(arms.items()):
        style = {"color": "black" if name == "dense" else f"C{number}", "label": arm["title"], "marker": "o"}
        runs = [list(values) for values in losses(arm).T]
        draw_band(axes[0, 0], known, runs, **style)
        draw_band(axes[0, 1], [tokens / step_tokens * arm["step_seconds"] for tokens in known], runs, **style)
        if name == "dense":
            continue
        for panel, key in zip(axes[1], ("equal_tokens", "equal_time"), strict=True):
            values = [(found["tokens"], found[key]["per_seed"]) for found in differences(results, name) if found[key]]
            if values:
                at, per_seed = zip(*values, strict=True)
                draw_band(panel, list(at), [list(seed) for seed in zip(*per_seed, strict=True)], **style)
    labels = (
        ("tokens", "loss, nats/token"),
        ("CPU seconds", "loss, nats/token"),
        ("tokens", "minus dense, equal tokens"),
        ("tokens of the MoE", "minus dense, equal CPU time"),
    )
    for panel, (x, y) in zip(axes.flat, labels, strict=True):
        panel.set(xlabel=x, ylabel=y, xscale="log")
        panel.grid(alpha=0.3, which="both")
    for panel in axes[1]:
        panel.axhline(0, color="black", linewidth=1)
    axes[0, 0].legend(fontsize="small")
    figure.savefig(path, dpi=90)
    plt.close(figure)
