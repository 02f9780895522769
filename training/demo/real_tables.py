"""What the run with a pretrained model found, as Markdown and as a picture that a README can take."""

import time
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from moe_hf.trainer.fair_comparison import verdict

from .card import real_command
from .settings import RealSettings


RESULTS_NAME, PICTURE_NAME = "results.md", "losses.png"
ARMS = {"dense": "dense control, MLPs of the same layers", "moe": "MoE, scope `moe`"}
COLOURS = {"dense": "#2b6cb0", "moe": "#c05621"}
HEADERS = ("model", "rate", "trained / active / total", "FLOPs", "tokens", "seconds")


def write_results(results: dict[str, Any], settings: RealSettings, output_dir: Path) -> None:
    """Write `results.md` and `losses.png` into the output folder, print the first, and say where the rest lies."""
    text = results_markdown(results, settings)
    (output_dir / RESULTS_NAME).write_text(text, encoding="utf-8")
    plot_losses(results, output_dir / PICTURE_NAME)
    print(f"\n{text}")
    print(f"This page: {output_dir / RESULTS_NAME}; the picture: {output_dir / PICTURE_NAME}")
    print(f"All figures: {output_dir / 'results.json'}")
    print(f"What each expert does: {output_dir / 'routing/report.html'}")
    print(f"To share the MoE, with its card: moe-hf push {output_dir / 'shared/model'} NAMESPACE/NAME")


def loss(measured: dict[str, Any], domain: str = "all") -> float:
    """The token loss in a model's figures on test text, nats/token."""
    return measured["held_out"][domain]["token_loss"]


def differences(results: dict[str, Any]) -> list[float]:
    """Test loss of the MoE minus that of its control, seed by seed."""
    return [loss(seed["moe"]) - loss(seed["dense"]) for seed in results["seeds"]]


def headline(results: dict[str, Any]) -> str:
    """What the comparison says, with what it cost."""
    first = results["seeds"][0]
    moe, dense = first["moe"], first["dense"]
    said = verdict(differences(results))
    return (
        f"{said[0].upper()}{said[1:]}, after {moe['tokens']:,} tokens each. Before, both had {loss(results['before']):.4f} "
        f"nats/token. A token costs the MoE {millions(moe['forward_flops_per_token'])} M FLOPs forward and "
        f"{millions(moe['active_parameters'])} M of its {millions(moe['parameters'])} M parameters, the dense model "
        f"{millions(dense['forward_flops_per_token'])} M and {millions(dense['parameters'])} M."
    )


def results_markdown(results: dict[str, Any], settings: RealSettings) -> str:
    """The page: headline, table, rates, seeds, exactness, export, memory, chat."""
    parts = [
        headline(results),
        f"`{real_command(settings)}`, {time.strftime('%Y-%m-%d')}: {results['seconds_of_all_stages'] / 60:.0f} min for all "
        f"stages, {results['machine']['peak_memory_gib']:.1f} GiB, {results['machine']['threads']} threads.",
        f"Loss in nats/token over {results['before']['held_out']['all']['tokens']:,} tokens of documents that nothing was "
        "trained or chosen on; parameters and forward FLOPs per token in millions:",
        models_table(results),
        rates_table(results),
    ]
    if len(results["seeds"]) > 1:
        parts += [
            "Each seed, its own order of the rows and its own routers, at the rates that were best with the first:",
            seeds_table(results),
        ]
    return "\n\n".join([*parts, f"![Loss by tokens]({PICTURE_NAME})", facts(results), chat_table(results)]) + "\n"


def models_table(results: dict[str, Any]) -> str:
    """One row per model; losses are means over the seeds."""
    domains = list(results["before"]["held_out"])
    rows = [[*HEADERS, *domains]]
    losses = {domain: f"{loss(results['before'], domain):.4f}" for domain in domains}
    rows.append(["dense model, before", "", *_sizes(results["before"], None), "", "", *losses.values()])
    upcycled = results["upcycled"]
    cells = [f"{loss(upcycled, domain):.4f}" for domain in domains]
    rows.append(["upcycled, not trained", "", *_sizes(upcycled, None), "", "", *cells])
    for arm, title in ARMS.items():
        seeds = [seed[arm] for seed in results["seeds"]]
        first, seconds = seeds[0], mean(seed["training_seconds"] for seed in seeds)
        cells = [f"{mean(loss(seed, domain) for seed in seeds):.4f}" for domain in domains]
        sizes = _sizes(first, first["trainable_parameters"])
        rate = f"{first['learning_rate']:g}"
        rows.append([title, rate, *sizes, f"{first['tokens']:,}", f"{seconds:.0f}", *cells])
    int8 = results["stages"]["int8"]
    cells = [f"{loss(int8, domain):.4f}" for domain in domains]
    rows.append([f"the same, experts in int8{_of_first(results)}", *[""] * 5, *cells])
    return markdown_table(rows)


def _of_first(results: dict[str, Any]) -> str:
    return ", first seed" if len(results["seeds"]) > 1 else ""


def _sizes(measured: dict[str, Any], trained: int | None) -> list[str]:
    own = [trained, measured["active_parameters"], measured["parameters"]]
    text = " / ".join("-" if count is None else millions(count) for count in own)
    return [text, millions(measured["forward_flops_per_token"])]


def rates_table(results: dict[str, Any]) -> str:
    """The rates that were tried, with the loss on validation text that chose among them."""
    rows = [["rate", *(ARMS)]]
    arms = {arm: dict(results["seeds"][0][arm]["rates"]) for arm in ARMS}
    for rate in sorted(set().union(*arms.values())):
        rows.append([f"{rate:g}", *(f"{arms[arm][rate]:.4f}" if rate in arms[arm] else "" for arm in ARMS)])
    before = results["before"]["validation"]["all"]["token_loss"]
    text = f"Loss on validation text after training at each rate, {before:.4f} before:\n\n{markdown_table(rows)}"
    chosen = {arm: results["seeds"][0][arm]["learning_rate"] for arm in ARMS}
    edges = [arm for arm, rate in chosen.items() if rate in (min(arms[arm]), max(arms[arm]))]
    return f"{text}\n\nThe best rate of {' and '.join(edges)} is at an edge of those tried." if edges else text


def seeds_table(results: dict[str, Any]) -> str:
    """Test loss of both arms, and their difference, seed by seed."""
    rows = [["seed", *ARMS, "difference"]]
    for seed, difference in zip(results["seeds"], differences(results), strict=True):
        rows.append([str(seed["seed"]), *(f"{loss(seed[arm]):.4f}" for arm in ARMS), f"{difference:+.4f}"])
    return markdown_table(rows)


def facts(results: dict[str, Any]) -> str:
    """How exact each step was, what the report says, how much memory it took."""
    check, stages = results["upcycled"]["verification"], results["stages"]
    native, int8 = stages["native"], stages["int8"]
    before, after = (int8["bytes"][name] / 2**20 for name in ("before", "after"))
    exported = (
        f"Not exported: {native['refused']}"
        if "refused" in native
        else (
            f"Exported to `{native['model_type']}`, and loaded by plain transformers in a fresh process without moe_hf: largest "
            f"difference of a logit {native['max_abs_error']:.1e}."
        )
    )
    return "\n".join(
        [
            f"- Upcycled: logits on real text differ from the dense model's by {check['relative_error']:.1e} (relative).",
            f"- {exported}",
            f"- Experts in int8: {before:,.0f} MiB become {after:,.0f} MiB; logits differ by {int8['relative_error']:.1e} "
            f"(relative), the most likely token is the same for {int8['same_choice']:.1%}.",
            f"- Memory at most: {results['machine']['peak_memory_gib']:.1f} GiB.",
        ]
    )


def chat_table(results: dict[str, Any]) -> str:
    """Greedy answers of the dense model, of the MoE before training, and of the best one after it."""
    rows = [["prompt", "dense model", "MoE before training", "MoE after"]]
    models = (results["before"], results["upcycled"], results["seeds"][0]["moe"])
    for dense, before, after in zip(*(model["chat"] for model in models), strict=True):
        same = "the same" if before["answer"] == dense["answer"] else _cell(before["answer"])
        rows.append([_cell(dense["prompt"]), _cell(dense["answer"]), same, _cell(after["answer"])])
    return f"Greedy answers:\n\n{markdown_table(rows)}"


def _cell(text: str) -> str:
    """Text that stays in its cell of a Markdown table."""
    escaped = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(" ".join(line.split()) for line in escaped.splitlines() if line.strip())


def markdown_table(rows: list[list[str]]) -> str:
    """Rows of cells, the first of which are headers."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]])


def millions(count: float) -> str:
    """A count in millions, in at least three digits."""
    return f"{count / 1e6:.3g}" if count < 1e8 else f"{count / 1e6:.0f}"


def gains(seed: dict[str, Any], arm: str) -> tuple[list[float], list[float]]:
    """Tokens, and how far the loss of the text that comes next is below the untrained dense model's on the same text."""
    tokens, losses = [0.0], [0.0]
    untrained, of_step, last = seed["untrained"], seed[arm]["tokens"] / seed[arm]["steps"], 0
    for step, measured in seed[arm]["curve"]:
        tokens.append(of_step * (last + step) / 2)
        losses.append(measured - mean(untrained[last:step]))
        last = step
    return tokens, losses


def plot_losses(results: dict[str, Any], path: Path) -> None:
    """Draw the loss of both arms by tokens, beside the untrained dense model's: means of the seeds, and their range.

    The loss is that of text just before it was trained on, which no run has seen. At the end stands that of the test text.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    before = loss(results["before"])
    for arm, title in ARMS.items():
        curves = [gains(seed, arm) for seed in results["seeds"]]
        tokens, by_point = curves[0][0], list(zip(*(losses for _, losses in curves), strict=True))
        axes.plot(tokens, [mean(values) for values in by_point], color=COLOURS[arm], label=title.replace("`", ""))
        low, high = [min(values) for values in by_point], [max(values) for values in by_point]
        axes.fill_between(tokens, low, high, color=COLOURS[arm], alpha=0.15, linewidth=0)
        ends = [loss(seed[arm]) - before for seed in results["seeds"]]
        last = [results["seeds"][0][arm]["tokens"]] * len(ends)
        axes.plot(
            last, ends, "o", color=COLOURS[arm], markersize=4, label=f"the same, on test text: {mean(ends):+.3f}"
        )
    count = len(results["seeds"])
    axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("loss minus the untrained dense model's")
    spread = f"; {count} seeds, their range shaded" if count > 1 else ""
    axes.set_title(f"Loss of text before it is trained on, nats/token{spread}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
