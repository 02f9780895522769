"""What the card of the demo's MoE says: measured beside its dense parent, with the run that made it."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_hf.reporting.card_facts import this_hardware, training_facts

from .settings import ARMS, Settings
from .tables import ROWS


METRICS = {"token_loss": "nats/token", "accuracy": "next token accuracy"}


def card_facts(
    records: dict[str, dict], name: str, control: str, settings: Settings, seed: int, training: Path, report: Path
) -> dict[str, Any]:
    """Facts for [`moe_hf.hub.save_model`] about the MoE of the arm `name`.

    Args:
        records (`dict`): of the stages of one seed, by name.
        name, control (`str`): the arm, and the dense one of the same scope and tokens.
        settings (`Settings`), seed (`int`): what they ran with.
        training (`Path`): folder of the arm's trainer.
        report (`Path`): folder of its routing report.
    """
    measured = {arm: records[arm]["result"]["held_out"] for arm in (name, "dense", control)}
    results = [
        {
            "dataset": f"CPython {domain}, held-out documents",
            "split": domain,
            "metric": shown,
            "value": round(of_domain[metric], 4),
            "parent": round(measured["dense"][domain][metric], 4),
        }
        for domain, of_domain in measured[name].items()
        if domain != "all"
        for metric, shown in METRICS.items()
    ]
    losses = {arm: f"{found['all']['token_loss']:.4f}" for arm, found in measured.items()}
    facts = {
        "training": {"scope": ARMS[name].scope} | training_facts(training, this_hardware()),
        "results": results,
        "routing_report": report,
        "commands": [command(settings, seed)],
        "limits": [
            "Made by a demonstration in minutes, on the source and the manual of CPython alone.",
            f"The dense parent stopped where this model's training began. Given the same {records[name]['result']['tokens']:,} "
            f"further tokens ({ROWS[control]}) it has {losses[control]} nats/token over all held-out text; this model has "
            f"{losses[name]}, the parent {losses['dense']}.",
        ],
    }
    if settings.source is None:
        facts |= {"title": "demo-moe", "license": "apache-2.0", "language": "en"}
    return facts


def command(settings: Settings, seed: int) -> str:
    """What makes this model again; a folder of the user's is not named."""
    changed = {
        field.name: str(getattr(settings, field.name))
        for field in fields(Settings)
        if field.name != "seeds" and getattr(settings, field.name) != field.default
    }
    if "source" in changed and Path(changed["source"]).expanduser().is_dir():
        changed["source"] = "FOLDER"
    if seed:
        changed["seeds"] = str(seed + 1)
    options = [f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in changed.items()]
    return " ".join(["python -m training.demo", *options]) if options else "make demo"
