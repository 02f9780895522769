"""What a comparison found: the table, the headline, `comparison.json`."""

from math import isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from moe_hf.errors import MoEError
from moe_hf.trainer.comparison.arms import CONTROL, OURS
from moe_hf.trainer.comparison.record import COMPARISON_FILE, write_json
from moe_hf.trainer.fair_comparison import paired_interval, verdict


Metrics = dict[str, float]


def print_comparison(columns: dict[str, Metrics], output_dir: Path) -> None:
    """Print the metrics that all `columns` have side by side, and write them to `output_dir/comparison.json`."""
    names = print_columns(columns)
    record = {title: {name: metrics[name] for name in names} for title, metrics in columns.items()}
    write_json(record, output_dir / COMPARISON_FILE)


def print_columns(columns: dict[str, Metrics]) -> list[str]:
    """Print the metrics that all `columns` have side by side; returns their names."""
    names = [name for name in next(iter(columns.values())) if all(_is_compared(name, c) for c in columns.values())]
    width = max(map(len, names), default=0)
    print("  ".join([" " * width, *(f"{title:>17}" for title in columns)]))
    for name in names:
        print("  ".join([f"{name:{width}}", *(f"{metrics[name]:17.4f}" for metrics in columns.values())]))
    return names


def _is_compared(name: str, metrics: Metrics) -> bool:
    is_cost = name.endswith(("runtime", "preparation_time", "per_second", "epoch", "tokens"))
    return isinstance(metrics.get(name), int | float) and not is_cost


def mean_loss(metrics: Metrics) -> float:
    """The loss over all text of an evaluation: `eval_loss`, or that of the domains, each by its tokens.

    Raises:
        MoEError: the evaluation has no loss.
    """
    if "eval_loss" in metrics:
        # One that is not finite is None in a record.
        return float("nan") if metrics["eval_loss"] is None else metrics["eval_loss"]
    domains = [name.removesuffix("_token_loss") for name in metrics if name.endswith("_token_loss")]
    if not domains:
        raise MoEError(f"An evaluation has no loss to compare: {', '.join(metrics)}.")
    tokens = [metrics[f"{name}_tokens"] for name in domains]
    losses = [metrics[f"{name}_token_loss"] for name in domains]
    if None in losses:
        return float("nan")
    return sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)


def summary(arms: dict[str, dict[str, Any]], seeds: list[int], reported_on: str) -> dict[str, Any]:
    """What `comparison.json` holds.

    Args:
        arms: by name (`OURS`, `CONTROL`): `before` (metrics or None), `per_seed` (metrics of each seed), and facts.
        reported_on: on which text.
    """
    found = {name: arm | {"after": _means(arm["per_seed"])} for name, arm in arms.items()}
    losses = {name: [mean_loss(metrics) for metrics in arm["per_seed"]] for name, arm in arms.items()}
    differences = [ours - theirs for ours, theirs in zip(losses[OURS], losses[CONTROL], strict=True)]
    difference: dict[str, Any] = {"per_seed": differences}
    if len(differences) > 1 and all(map(isfinite, differences)):
        difference |= dict(zip(("mean", "low", "high"), paired_interval(differences), strict=True))
    notes = [note for name, arm in found.items() for note in _notes(name, arm)]
    return {
        "headline": _headline(found, differences),
        "notes": notes,
        "reported_on": reported_on,
        "seeds": seeds,
        "difference": difference,
        **found,
    }


def _means(per_seed: list[Metrics]) -> Metrics:
    names = [name for name in per_seed[0] if all(isinstance(m.get(name), int | float) for m in per_seed)]
    return {name: mean(metrics[name] for metrics in per_seed) for name in names}


def _headline(arms: dict[str, dict[str, Any]], differences: list[float]) -> str:
    ours, control = arms[OURS], arms[CONTROL]
    said = (
        verdict(differences, ours=OURS, theirs=f"its {CONTROL}")
        if all(map(isfinite, differences))
        else "a loss is not finite"
    )
    tokens = " and ".join(f"{n:,}" for n in dict.fromkeys((ours["training_tokens"], control["training_tokens"])))
    flops = f"{_amount(ours['training_flops'])} against {_amount(control['training_flops'])}"
    sizes = " against ".join(
        f"{_amount(arm['active_parameters'])} active of {_amount(arm['total_parameters'])}" for arm in (ours, control)
    )
    return f"After {tokens} tokens of training, {said}; training FLOPs {flops}; parameters {sizes}."


def _amount(value: float) -> str:
    if value < 1e6:
        return f"{value:,.0f}"
    return f"{value / 1e6:,.1f} M" if value < 1e9 else f"{value:.2e}"


def _notes(name: str, arm: dict[str, Any]) -> list[str]:
    """What a reader of the headline should know too."""
    notes = []
    if arm["rate_at_edge"]:
        rates = sorted(map(float, arm["sweep"]))
        edge = "lowest" if arm["learning_rate"] == rates[0] else "highest"
        beyond = "lower" if edge == "lowest" else "higher"
        notes.append(
            f"The rate of {name}, {arm['learning_rate']:g}, is the {edge} of {len(rates)} tried, and {beyond} ones may be "
            f"better: give {'control_learning_rate' if name == CONTROL else 'learning_rate'} there, or a larger sweep."
        )
    if arm["before"] is not None and mean_loss(arm["before"]) < mean_loss(arm["after"]):
        notes.append(
            f"Training made {name} worse on this text: loss {mean_loss(arm['before']):.4f} before, "
            f"{mean_loss(arm['after']):.4f} after."
        )
    return notes


def print_summary(found: dict[str, Any]) -> None:
    """Print the table of metrics, what was compared, and the headline."""
    columns = {}
    for name in (OURS, CONTROL):
        for when in ("before", "after"):
            if found[name][when] is not None:
                columns[f"{name} {when}"] = {"loss": mean_loss(found[name][when]), **found[name][when]}
    seeds = f"{'mean of seeds' if len(found['seeds']) > 1 else 'seed'} {', '.join(map(str, found['seeds']))}"
    print(f"On {found['reported_on']}, {seeds}:")
    print_columns(columns)
    for name in (OURS, CONTROL):
        arm = found[name]
        tried = f", the best of {', '.join(arm['sweep'])}" if arm["sweep"] else ""
        print(
            f"{name}: {arm['trained']}; learning rate {arm['learning_rate']:g}{tried}; "
            f"{arm['active_parameters']:,} of {arm['total_parameters']:,} parameters active; "
            f"{arm['training_tokens']:,} tokens, {arm['training_flops']:.3g} training FLOPs per seed"
        )
    for line in (*found["notes"], found["headline"]):
        print(line)
