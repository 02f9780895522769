"""What the demo found: means and spreads over seeds, comparisons of equals, and the table that is printed."""

from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table


# Each MoE arm and the dense control it is compared with.
COMPARISONS = {
    "scope moe against dense FFN, equal tokens": ("moe_moe", "dense_ffn"),
    "scope all against dense all, equal tokens": ("moe_all", "dense_all"),
    "scope all against dense all, equal FLOPs": ("moe_all", "dense_all_equal_flops"),
    "half-width experts, scope all, against dense all, equal tokens and FLOPs": ("granular_all", "dense_all"),
}
ROWS = {
    "bigram": "bigram, Kneser-Ney",
    "dense": "dense model",
    "moe": "upcycled, not trained",
    "granular": "upcycled, half-width experts",
    "dense_ffn": "dense, FFN only",
    "moe_moe": "MoE, scope moe",
    "dense_all": "dense, all",
    "dense_all_equal_flops": "dense, all, equal FLOPs",
    "moe_all": "MoE, scope all",
    "granular_all": "half-width experts, scope all",
}


def _losses(seeds: list[dict], name: str, domain: str = "all") -> list[float]:
    return [seed[name]["held_out"][domain]["token_loss"] for seed in seeds]


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": mean(values), "min": min(values), "max": max(values)}


def summary(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out token loss of each model over the seeds, and differences (MoE minus dense, nats/token) seed by seed."""
    domains = list(seeds[0]["dense"]["held_out"])
    losses = {
        name: {domain: _spread(_losses(seeds, name, domain)) for domain in domains}
        for name in ROWS
        if name in seeds[0]
    }
    differences = {}
    for title, (moe, dense) in COMPARISONS.items():
        values = [ours - control for ours, control in zip(_losses(seeds, moe), _losses(seeds, dense), strict=True)]
        differences[title] = {"per_seed": values, "moe_is_better": [value < 0 for value in values], **_spread(values)}
    return {"held_out_token_loss": losses, "differences": differences}


def results_table(results: dict[str, Any]) -> Table:
    """One row per model; means over the seeds."""
    seeds = results["seeds"]
    domains = [name for name in seeds[0]["dense"]["held_out"] if name != "all"]
    table = Table(title=f"Held-out text, {len(seeds)} seed(s); losses in nats/token, parameters and FLOPs in millions")
    table.add_column("model")
    headers = ("trained", "total", "FLOPs/token", "tokens", "seconds", *domains, "all", "perplexity", "accuracy")
    for header in headers:
        table.add_column(header, justify="right")
    for name, title in ROWS.items():
        if name not in seeds[0]:
            continue
        first = seeds[0][name]
        cells = [
            _millions(first.get("trainable_parameters", first.get("parameters") if "tokens" in first else None)),
            _millions(first.get("parameters")),
            _millions(first.get("forward_flops_per_token")),
            f"{first['tokens']:,}" if "tokens" in first else "",
            f"{mean(seed[name]['seconds'] for seed in seeds):.0f}",
            *(f"{mean(_losses(seeds, name, domain)):.3f}" for domain in domains),
            _with_range(_losses(seeds, name)),
            _mean_of(seeds, name, "perplexity", ".2f"),
            _mean_of(seeds, name, "accuracy", ".3f"),
        ]
        table.add_row(title, *cells)
    return table


def _millions(value: float | None) -> str:
    return "" if value is None else f"{value / 1e6:.2f}"


def _with_range(values: list[float]) -> str:
    text = f"{mean(values):.3f}"
    return text if len(values) == 1 else f"{text} ({min(values):.3f} to {max(values):.3f})"


def _mean_of(seeds: list[dict], name: str, metric: str, form: str) -> str:
    values = [seed[name]["held_out"]["all"].get(metric) for seed in seeds]
    return "" if None in values else format(mean(values), form)


def print_results(results: dict[str, Any], output_dir: Path) -> None:
    """Print the table, the comparisons, a sample, and where the rest lies."""
    console = Console(width=None if Console().is_terminal else 160)
    console.print(results_table(results))
    for title, difference in results["summary"]["differences"].items():
        wins = sum(difference["moe_is_better"])
        console.print(
            f"{title}: MoE minus dense {difference['mean']:+.4f} nats/token "
            f"({difference['min']:+.4f} to {difference['max']:+.4f}); lower in {wins} of {len(results['seeds'])}"
        )
    first = results["seeds"][0]
    check, reload = first["moe"]["verification"], first["moe_all-reload"]
    console.print(f"Upcycled logits against the dense model's: relative error {check['relative_error']:.1e}")
    console.print(f"Reloaded in a fresh process: largest difference of a logit {reload['max_abs_error']:.1e}")
    console.print("A sample:", style="bold")
    console.print(reload["samples"][0], markup=False, highlight=False)
    seconds, memory = results["seconds_of_all_stages"], results["machine"]["peak_memory_gib"]
    console.print(
        f"All stages took {seconds:.0f} s, this run {results['seconds_of_this_run']:.0f} s, {memory:.1f} GiB"
    )
    console.print(f"Results: {output_dir / 'results.json'}")
    console.print(f"What each expert does: {output_dir / 'seed0/moe_all-routing/report.html'}")
    console.print(
        f"To share it, with its card: moe-hf push {output_dir / 'seed0/moe_all-shared/model'} NAMESPACE/NAME"
    )
