"""What the card says that a push writes, in the words of `Trainer.push_to_hub` and `Trainer.create_model_card`."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from moe_hf.errors import MoEError


# Trainer's names, by those of `moe_hf.reporting.card.model_card`.
FACTS = {"language": "language", "license": "license", "model_name": "title", "finetuned_from": "base_model"}
DATASETS = ("dataset_tags", "dataset", "dataset_args")


def take_card_arguments(given: Mapping[str, Any], push: Callable) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split the arguments of a push into facts for the card and those of `push`.

    Args:
        given (`Mapping`): of `Trainer.create_model_card`: `language`, `license`, `tags`, `model_name`, `finetuned_from`,
            `tasks` (which become tags), `dataset_tags` (ids of the Hub), `dataset` and `dataset_args` (names, which become
            a row of the table about the run); and of `push`.
        push (`Callable`): what pushes, such as `moe_hf.hub.push_model`.

    Returns:
        `tuple[dict, dict]`: facts as [`model_card`] takes them, and what is left for `push`.

    Raises:
        MoEError: a name that neither knows.
    """
    own = [name for name, p in inspect.signature(push).parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    unknown = sorted(given.keys() - {*FACTS, *DATASETS, "tags", "tasks", *own})
    if unknown:
        known = ", ".join(sorted({*FACTS, *DATASETS, "tags", "tasks", *own}))
        raise MoEError(f"push_to_hub has no argument {unknown[0]!r}; it knows {known}.")
    rest = {name: value for name, value in given.items() if name in own and name != "tags"}
    facts = {FACTS[name]: value for name, value in given.items() if name in FACTS and value is not None}
    tags = [*_listed(given.get("tags")), *_listed(given.get("tasks"))]
    if tags:
        rest["tags"] = list(dict.fromkeys(tags))
    if given.get("dataset_tags"):
        facts["datasets"] = _listed(given["dataset_tags"])
    names = [*_listed(given.get("dataset")), *(f"({words})" for words in _listed(given.get("dataset_args")))]
    if names:
        facts["training"] = {"dataset": " ".join(names)}
    return facts, rest


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
