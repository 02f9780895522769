"""What the cards of the MoEs say: measured beside the dense parent, with the run that made them."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from moe_hf.reporting.card_facts import this_hardware, training_facts

from .chat import QUESTIONS
from .settings import ARMS, MINUTES, MINUTES_PER_SEED, RealSettings, Settings
from .source import BASE_MODEL, LICENSE
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
    results = result_facts(measured[name], parent=measured["dense"])
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


def result_facts(measured: dict[str, dict], **beside: dict[str, dict]) -> list[dict[str, Any]]:
    """What a model was measured at on the text that nobody trained on, beside dense models (`parent`, `control`), by domain."""
    return [
        {
            "dataset": f"CPython {domain}, held-out documents",
            "split": domain,
            "metric": shown,
            "value": round(of_domain[metric], 4),
        }
        | {name: round(found[domain][metric], 4) for name, found in beside.items()}
        for domain, of_domain in measured.items()
        if domain != "all"
        for metric, shown in METRICS.items()
    ]


def real_card_facts(records: dict[str, dict], settings: RealSettings, training: Path, report: Path) -> dict[str, Any]:
    """Facts for [`moe_hf.hub.save_model`] about the fine-tuned MoE of a pretrained model, of the first seed.

    Args:
        records (`dict`): of the stages, by name.
        settings (`RealSettings`): what they ran with.
        training (`Path`): folder of the trainer of the best run.
        report (`Path`): folder of its routing report.
    """
    parent, moe, control = (records[name]["result"] for name in ("dense", "seed0/moe-best", "seed0/dense-best"))
    losses = [f"{one['held_out']['all']['token_loss']:.4f}" for one in (parent, control, moe)]
    rate = {
        "learning rate": f"{moe['learning_rate']:g}, the best of {', '.join(f'{rate:g}' for rate, _ in moe['rates'])}"
    }
    facts = {
        "training": {"scope": "moe"} | rate | training_facts(training, this_hardware()),
        "results": result_facts(moe["held_out"], parent=parent["held_out"], control=control["held_out"]),
        "routing_report": report,
        "commands": [real_command(settings)],
        "limits": [
            "Made by a demonstration in minutes, on the source and the manual of CPython alone.",
            f"The dense parent has {losses[0]} nats/token over all held-out text. Its MLPs in the layers that have experts here, "
            f"trained on the same {moe['tokens']:,} tokens at their own best rate, come to {losses[1]}; this model has {losses[2]}.",
        ],
    }
    first = moe["chat"][0]
    if first["prompt"] in QUESTIONS:
        turns = (("user", first["prompt"]), ("assistant", first["answer"]))
        facts["chat"] = [{"role": role, "content": content} for role, content in turns]
    if settings.source is None:
        facts |= {"title": "smollm2-135m-moe", "base_model": BASE_MODEL, "license": LICENSE, "language": "en"}
        facts["limits"].append("The dense parent's weights were quantised to 4 bits, and are read from there.")
    return facts


def real_command(settings: RealSettings) -> str:
    """What makes this model again, as a user types it."""
    changed = _changed(settings)
    # Without them they follow from the number of seeds.
    if settings.minutes == (MINUTES if settings.seeds == 1 else MINUTES_PER_SEED * settings.seeds):
        changed.pop("minutes", None)
    if settings.seeds == 1:
        changed.pop("seeds", None)
    if set(changed) <= {"seeds", "minutes"}:
        return " ".join(["make demo REAL=1", *(f"{name.upper()}={value}" for name, value in changed.items())])
    return " ".join(["python -m training.demo --real", *_options(changed)])


def command(settings: Settings, seed: int) -> str:
    """What makes this model again; a folder of the user's is not named."""
    changed = _changed(settings)
    changed.pop("seeds", None)
    if seed:
        changed["seeds"] = str(seed + 1)
    return " ".join(["python -m training.demo", *_options(changed)]) if changed else "make demo"


def _changed(settings: Settings | RealSettings) -> dict[str, str]:
    """The settings that are not their defaults, as text."""
    changed = {
        field.name: f"{value:g}" if isinstance(value := getattr(settings, field.name), float) else str(value)
        for field in fields(settings)
        if getattr(settings, field.name) != field.default
    }
    path = Path(changed.get("source", "")).expanduser()
    if "source" in changed and path.exists():
        changed["source"] = "FOLDER" if path.is_dir() else "FILE.gguf"
    return changed


def _options(changed: dict[str, str]) -> list[str]:
    return [f"--{name.replace('_', '-')} {shlex.quote(value)}" for name, value in changed.items()]
