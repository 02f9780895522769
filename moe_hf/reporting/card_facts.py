"""What a training run, an evaluation, a routing report and the dense parent say for a model card."""

import os
import platform
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    eval_result_entries_to_yaml,
    try_to_load_from_cache,
)

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_scores import read_json
from moe_hf.gguf_files import gguf_file_of, read_gguf
from moe_hf.reporting.statistics import FORMAT, JSON_NAME, PICTURE_NAME, figure_text


TRAINER_STATE = "trainer_state.json"
EVAL_RESULTS_NAME = ".eval_results/moe_hf.yaml"
REQUIRED_OF_A_RESULT = ("dataset", "metric", "value")
# Values of other models beside this one's, and the titles of their columns.
BESIDE = {"before": "before training", "parent": "dense parent", "control": "dense control, trained alike"}
KNOWN_OF_A_RESULT = (*REQUIRED_OF_A_RESULT, *BESIDE, "split", "dataset_id", "task_id")


def training_facts(run: str | Path | Mapping[str, Any], hardware: str | None = None) -> dict[str, Any]:
    """Rows of a card about a run of any `Trainer`, from its state: steps, tokens, time, loss.

    Args:
        run (`str`, `Path` or `dict`): a folder with `trainer_state.json` (a checkpoint, or a run with checkpoints: its last
            one), that file, or its content.
        hardware (`str`, *optional*): what it ran on, which the state does not say; see [`this_hardware`].

    Returns:
        `dict` of name and value. What the state does not hold is left out: tokens need `include_num_input_tokens_seen` in the
        arguments, the time a run that came to its end.

    Raises:
        MoEError: there is no such file, or it is no trainer's state.
    """
    state = run if isinstance(run, Mapping) else _read_state(Path(run).expanduser())
    if not isinstance(state.get("global_step"), int):
        raise MoEError(f"The content of {TRAINER_STATE} has no global_step: it is not the state of a Trainer.")
    history = state.get("log_history") or []
    if not isinstance(history, list):
        raise MoEError(f"log_history in the content of {TRAINER_STATE} is {history!r}: it must be a list.")
    history = [entry for entry in history if isinstance(entry, dict)]
    losses = [_number(entry, "loss", float) for entry in history if entry.get("loss") is not None]
    seconds = [_number(entry, "train_runtime", float) for entry in history if entry.get("train_runtime") is not None]
    tokens, epochs = _number(state, "num_input_tokens_seen", int), _number(state, "epoch", float)
    rows = {
        "optimizer steps": f"{state['global_step']:,}",
        "tokens": f"{tokens:,}" if tokens else None,
        "epochs": f"{epochs:.3g}" if epochs else None,
        "last training loss": f"{losses[-1]:.4f} nats/token" if losses else None,
        "wall time": _time_text(seconds[-1]) if seconds else None,
        "hardware": hardware,
    }
    return {name: value for name, value in rows.items() if value is not None}


def _number(entry: Mapping[str, Any], name: str, kind: type) -> Any:
    value = 0 if entry.get(name) is None else entry[name]
    if isinstance(value, int | float):
        try:
            return kind(value)
        except (ValueError, OverflowError):
            pass
    raise MoEError(f"{name} in the content of {TRAINER_STATE} is {value!r}: it must be a number.")


def this_hardware() -> str:
    """The accelerators of this process's machine, or its CPU cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} threads"


def _read_state(path: Path) -> dict[str, Any]:
    file = path
    if path.is_dir() and not (path / TRAINER_STATE).is_file():
        steps = {int(match[1]): p for p in path.iterdir() if (match := re.fullmatch(r"checkpoint-(\d+)", p.name))}
        file = (steps[max(steps)] if steps else path) / TRAINER_STATE
    elif path.is_dir():
        file = path / TRAINER_STATE
    return read_json(file)


def _time_text(seconds: float) -> str:
    hours, minutes = seconds / 3600, seconds / 60
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


def check_results(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Measurements for a card, each a dict: `dataset`, `metric`, `value`; and, where known, on the same text `before` (this
    model's before training), `parent` (the dense parent's) and `control` (a dense model's that was trained alike), `split`, and
    for a benchmark of the Hub its `dataset_id` and `task_id`.

    Raises:
        MoEError: a row with other names, without a number, or with one of `dataset_id` and `task_id` alone.
    """
    if not isinstance(results, list | tuple) or not all(isinstance(row, Mapping) for row in results):
        raise MoEError(f"card_facts['results'] is a list of dicts with {', '.join(KNOWN_OF_A_RESULT)}.")
    for row in results:
        missing = [name for name in REQUIRED_OF_A_RESULT if name not in row]
        unknown = [name for name in row if name not in KNOWN_OF_A_RESULT]
        if missing or unknown:
            raise MoEError(
                f"A row of card_facts['results'] {'lacks' if missing else 'has'} {(missing or unknown)[0]!r}; it takes "
                f"{', '.join(KNOWN_OF_A_RESULT)}, the first three in any case."
            )
        for name in ("value", *BESIDE):
            if name in row and (not isinstance(row[name], int | float) or isinstance(row[name], bool)):
                raise MoEError(f"{name} of the result {row['dataset']!r} is {row[name]!r}; it must be a number.")
        if ("dataset_id" in row) != ("task_id" in row):
            raise MoEError(f"The result {row['dataset']!r} has one of dataset_id and task_id; the Hub needs both.")
    return [dict(row) for row in results]


def result_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of the card's table; a column beside the model's is there if any row has it."""
    columns = [name for name in BESIDE if any(name in row for row in results)]
    rows = []
    for row in results:
        shown = {"data": row["dataset"], "metric": row["metric"], "this model": figure_text(row["value"])}
        shown |= {BESIDE[name]: figure_text(row[name]) if name in row else "" for name in columns}
        rows.append(shown)
    return rows


def eval_results(results: list[dict[str, Any]]) -> list[EvalResult]:
    """The results of this model for the `model-index` of a card's metadata."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=row.get("dataset_id") or re.sub(r"[^a-z0-9]+", "-", row["dataset"].lower()).strip("-"),
            dataset_name=row["dataset"],
            dataset_split=row.get("split"),
            metric_type=re.sub(r"[^a-z0-9]+", "_", row["metric"].lower()).strip("_"),
            metric_name=row["metric"],
            metric_value=row["value"],
        )
        for row in results
    ]


def eval_results_file(results: list[dict[str, Any]]) -> dict[str, bytes]:
    """The file of `.eval_results` by its name, of the results on benchmarks of the Hub; empty without any."""
    entries = [
        EvalResultEntry(
            dataset_id=row["dataset_id"],
            task_id=row["task_id"],
            value=row["value"],
            notes=f"{row['metric']}; dense parent: {row['parent']}" if "parent" in row else row["metric"],
        )
        for row in results
        if "dataset_id" in row
    ]
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    return {EVAL_RESULTS_NAME: text.encode()} if entries else {}


def routing_health(report: str | Path | None) -> tuple[dict[str, str], dict[str, bytes]]:
    """The summary of a routing report, and its picture by name; both empty without one.

    Raises:
        MoEError: the folder has no report.
    """
    if report is None:
        return {}, {}
    folder = Path(report).expanduser()
    content = read_json(folder / JSON_NAME)
    if content.get("format") != FORMAT or not isinstance(content.get("summary"), dict):
        raise MoEError(f"{folder / JSON_NAME} is no routing report: make one with `moe-hf report --output`.")
    picture = folder / PICTURE_NAME
    if not picture.is_file():
        raise MoEError(
            f"The routing report {folder} has no {PICTURE_NAME}: make it again with `moe-hf report --output`."
        )
    rows = {name: figure_text(value) for name, value in content["summary"].items()}
    return rows, {PICTURE_NAME: picture.read_bytes()}


def license_of(source: str | None) -> str | None:
    """The licence that a dense model on this machine names: in a folder's or the Hub's card, or a GGUF file. None if unknown."""
    if not source:
        return None
    if Path(source).expanduser().exists() and (gguf := gguf_file_of(source)) is not None:
        return read_gguf(gguf).license
    file = Path(source).expanduser() / "README.md"
    if not file.is_file():
        try:
            cached = try_to_load_from_cache(source, "README.md")
        except ValueError:
            # No name that the Hub could have.
            return None
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    try:
        found = ModelCard.load(file).data.license
    except (OSError, ValueError, yaml.YAMLError):
        # The parent's card is not ours to repair.
        return None
    return found if isinstance(found, str) else None
