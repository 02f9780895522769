"""What lies beside a model that a training run left: its measurements, for the card."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_hf.finetuning.expert_scores import read_json
from moe_hf.reporting.card_facts import TRAINER_STATE, training_facts


EVALUATION_FILE, COMPARISON_FILE = "eval_results.json", "comparison.json"
# Arms of a comparison.
OURS, CONTROL = "this model", "control"
# A run saves its model there.
MODEL_FOLDER = re.compile(r"final|checkpoint-\d+")
COSTS = ("runtime", "preparation_time", "per_second", "epoch", "tokens")


def run_folder(model: str | Path) -> Path | None:
    """The folder of the run that left a model: the model's own, or the one around `final` and `checkpoint-N`; None without."""
    folder = Path(model).expanduser().absolute()
    if not folder.is_dir():
        return None
    around = [folder.parent] if MODEL_FOLDER.fullmatch(folder.name) else []
    names = (EVALUATION_FILE, COMPARISON_FILE, TRAINER_STATE)
    return next((place for place in (*around, folder) if any((place / name).is_file() for name in names)), None)


def run_facts(folder: str | Path) -> dict[str, Any]:
    """Facts for a card from the files of a run: `results` and `headline` of `comparison.json`, or else `results` of
    `eval_results.json`; and `training` of `trainer_state.json`. What is not there, or holds no figures, is left out.

    Raises:
        MoEError: a file that cannot be read, or is no JSON object.
    """
    folder = Path(folder).expanduser()
    facts: dict[str, Any] = {}
    if (folder / COMPARISON_FILE).is_file():
        found = read_json(folder / COMPARISON_FILE)
        facts["results"] = _compared(found)
        if isinstance(found.get("headline"), str):
            facts["headline"] = found["headline"]
    if not facts.get("results") and (folder / EVALUATION_FILE).is_file():
        facts["results"] = evaluation_results(read_json(folder / EVALUATION_FILE))
    if (folder / TRAINER_STATE).is_file() or any(folder.glob(f"checkpoint-*/{TRAINER_STATE}")):
        facts["training"] = training_facts(folder)
    return {name: value for name, value in facts.items() if value}


def evaluation_results(metrics: Mapping[str, Any], on: str = "held-out text") -> list[dict[str, Any]]:
    """Rows of the card's results from the metrics of an evaluation, without its costs."""
    return [
        {"dataset": on, "metric": _metric(name), "value": metrics[name]} for name in metrics if _says(name, metrics)
    ]


def _compared(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    ours, control = (found.get(arm) if isinstance(found.get(arm), Mapping) else {} for arm in (OURS, CONTROL))
    # With figures before and after, or after alone.
    before, after = ours.get("before") or {}, ours.get("after", ours)
    beside = control.get("after", control)
    rows = evaluation_results(after, found.get("reported_on", "held-out text"))
    for row, name in zip(rows, [name for name in after if _says(name, after)], strict=True):
        row |= {"before": before[name]} if _says(name, before) else {}
        row |= {"control": beside[name]} if _says(name, beside) else {}
    return rows


def _says(name: str, metrics: Mapping[str, Any]) -> bool:
    value = metrics.get(name)
    return isinstance(value, int | float) and not isinstance(value, bool) and not name.endswith(COSTS)


def _metric(name: str) -> str:
    return name.removeprefix("eval_").replace("_", " ")
