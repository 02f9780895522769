"""Which experts train: chosen from their scores, kept as JSON, found in a model.

Letters: L MoE layers, E experts.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_scores import ExpertScores, read_json
from moe_hf.finetuning.moe_blocks import experts_in, find_moe_blocks


SCORES = ("token_share", "gate_score")
# Scores are sums of many shares: one that meets the threshold in decimals may miss it by a rounding error.
THRESHOLD_TOLERANCE = 1e-9


@dataclass(frozen=True)
class ExpertSelection:
    """The experts that train, layer by layer, in the form of the ESFT authors' files.

    Attributes:
        experts: ids of experts by the name of their MoE block, or by the number of its layer, the best first. Layers that
            are not named have none.
        shared_experts: train the shared experts and their gates too.
        non_expert_modules: train everything outside the MoE blocks too.
    """

    experts: Mapping[str, tuple[int, ...]]
    shared_experts: bool = False
    non_expert_modules: bool = False

    @property
    def num_experts(self) -> int:
        """Experts in all layers together."""
        return sum(map(len, self.experts.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "experts": {name: list(ids) for name, ids in self.experts.items()},
            "shared_experts": self.shared_experts,
            "non_expert_modules": self.non_expert_modules,
        }

    def save(self, path: str | Path) -> None:
        """Write a JSON file that `load` reads."""
        Path(path).write_text(json.dumps(self.to_dict()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, source: "str | Path | Mapping[str, Any] | ExpertSelection") -> "ExpertSelection":
        """Read a selection from a JSON file, from its content (as text too), or from a plain map of layers to ids.

        Raises:
            MoEError: there is no such file, or it holds something else.
        """
        if isinstance(source, ExpertSelection):
            return source
        if isinstance(source, str) and source.lstrip().startswith("{"):
            source = _parse(source)
        if not isinstance(source, Mapping | str | Path):
            raise MoEError(
                f"{source!r} is no selection of experts: a map of layers to ids, or a JSON file, is expected."
            )
        content = dict(source) if isinstance(source, Mapping) else read_json(source)
        where = "The selection" if isinstance(source, Mapping) else str(source)
        if "experts" not in content:
            content = {"experts": content}
        unknown = set(content) - {"experts", "shared_experts", "non_expert_modules"}
        experts = content["experts"]
        if unknown or not isinstance(experts, Mapping):
            raise MoEError(
                f"{where} is no selection of experts{f' ({sorted(unknown)[0]!r} is unknown)' if unknown else ''}. "
                'Expected {"experts": {layer: [ids]}, "shared_experts": false, "non_expert_modules": false}.'
            )
        for name, ids in experts.items():
            is_list = isinstance(ids, Sequence) and not isinstance(ids, str)
            if not is_list or any(type(i) is not int or i < 0 for i in ids) or len(set(ids)) != len(ids):
                raise MoEError(f"{where}: layer {name} has {ids!r}; a list of different ids of experts is expected.")
        switches = {name: content.get(name, False) for name in ("shared_experts", "non_expert_modules")}
        for name, value in switches.items():
            if not isinstance(value, bool):
                raise MoEError(f"{where}: {name} is {value!r}; it must be true or false.")
        return cls({str(name): tuple(ids) for name, ids in experts.items()}, **switches)

    def resolve(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """The chosen ids in ascending order by the full name of the MoE block, in the model's order.

        Raises:
            MoEError: a layer that the model does not have or that is named twice, an expert that its layer does not have,
                or no expert at all.
        """
        blocks = find_moe_blocks(model)
        found: dict[str, tuple[int, ...]] = {}
        for name, ids in self.experts.items():
            block = name if name in blocks else _block_of_layer(name, list(blocks), type(model).__name__)
            if block in found:
                raise MoEError(f"The selection names {block} twice.")
            count = experts_in(blocks[block].experts)
            outside = [i for i in ids if i >= count]
            if outside:
                raise MoEError(f"The selection names expert {outside[0]} of {block}, which has {count}.")
            found[block] = tuple(sorted(ids))
        if not any(found.values()):
            raise MoEError("The selection names no expert. Raise top_p or the budget.")
        return {name: found[name] for name in blocks if found.get(name)}


def _parse(text: str) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        raise MoEError(f"The selection {text!r} is no JSON: {error}.") from error


def _block_of_layer(number: str, blocks: list[str], model: str) -> str:
    named = [block for block in blocks if number in block.split(".")]
    if not number.isdigit() or len(named) != 1:
        known = ", ".join(blocks[:4]) + (", ..." if len(blocks) > 4 else "")
        raise MoEError(f"The selection names the layer {number!r}; {model} has MoE blocks {known or 'in no layer'}.")
    return named[0]


def select_experts(
    scores: ExpertScores,
    *,
    top_p: float | None = None,
    budget: int | None = None,
    by: str = "token_share",
    shared_experts: bool = False,
    non_expert_modules: bool = False,
) -> ExpertSelection:
    """Choose the experts that a task uses most.

    Args:
        scores (`ExpertScores`): of the model on text of the task.
        top_p (`float`): in each layer the fewest experts whose scores reach this share of the layer's, in (0, 1]; ESFT's
            published selections are of 0.2 by `token_share`.
        budget (`int`): so many experts in all layers together, those of the highest shares.
        by (`str`): `"token_share"` or `"gate_score"`; the latter is divided by the layer's sum.
        shared_experts, non_expert_modules (`bool`): train these too.

    Raises:
        MoEError: not exactly one of `top_p` and `budget`, or one outside its range.

    Source: ESFT (https://huggingface.co/papers/2407.01906).
    """
    if by not in SCORES:
        raise MoEError(f"by is {by!r}; it must be {' or '.join(SCORES)}.")
    if (top_p is None) == (budget is None):
        raise MoEError("Give top_p or budget, one of the two.")
    shares = getattr(scores, by)
    if by == "gate_score":
        shares = shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)
    if top_p is not None:
        if not 0 < top_p <= 1:
            raise MoEError(f"top_p is {top_p}; it must be in (0, 1].")
        chosen = {name: _top_p(row, top_p) for name, row in _rows(scores, shares)}
    else:
        total = sum(scores.num_experts)
        if not 0 < budget <= total:
            raise MoEError(f"budget is {budget}; it must be in [1, {total}], the experts of all layers.")
        ranked = [(-share, i, e) for i, (_, row) in enumerate(_rows(scores, shares)) for e, share in enumerate(row)]
        kept = sorted(ranked)[:budget]
        chosen = {name: tuple(e for _, layer, e in kept if layer == i) for i, name in enumerate(scores.layers)}
    return ExpertSelection(chosen, shared_experts, non_expert_modules)


def _rows(scores: ExpertScores, shares: torch.Tensor) -> list[tuple[str, list[float]]]:
    counts = zip(scores.layers, shares.tolist(), scores.num_experts, strict=True)
    return [(name, row[:count]) for name, row, count in counts]


def _top_p(row: list[float], top_p: float) -> tuple[int, ...]:
    chosen, reached = [], 0.0
    for expert in sorted(range(len(row)), key=lambda expert: -row[expert]):
        if reached >= top_p - THRESHOLD_TOLERANCE or row[expert] <= 0:
            break
        chosen.append(expert)
        reached += row[expert]
    return tuple(chosen)
