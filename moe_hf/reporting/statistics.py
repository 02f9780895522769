"""The figures of a routing report: what each expert of each layer did for a text. No tensor grows with the text.

Letters: E experts, L MoE layers, G groups of tokens, n tokens of a sample.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_hf.finetuning.router_watch import layer_label
from moe_hf.reporting.layer_sums import ChangeSums, LayerSums


FORMAT = "moe_hf.routing_report"
JSON_NAME, PAGE_NAME, PICTURE_NAME = "routing.json", "report.html", "routing.png"
# Of a layer's tokens; an expert that more of them use is saturated, where an even share would be less.
SATURATED_SHARE = 0.9
# Above it a table of pairs of experts is not written; the strongest pairs always are.
LARGEST_PAIR_TABLE = 64
STRONGEST_PAIRS = 10


@dataclass(frozen=True)
class LayerStatistics:
    """What one router did.

    Attributes:
        name: the module of its block.
        num_tokens: tokens that it decided about; sub-tokens where it routes those.
        choices: (E,) int64, how often each expert was chosen, served or not.
        dropped: (E,) int64, choices that were not served (weight 0).
        mean_weight: (E,) float64, the weight that an expert had, mean over the tokens that it served; 0 if none.
        entropy: of a token's scores in nats, mean over tokens; ln E when undecided.
        top_1_probability: the largest score, of scores that sum to 1, mean over tokens.
        active: (E + 1,) int64, how many tokens were served by 0, 1, 2, ... experts.
        together: (E, E) int64, how many tokens were served by both; the diagonal: by this one.
        groups: by kind, (G, E) int64, choices by tokens of each group.
    """

    name: str
    num_tokens: int
    choices: torch.Tensor
    dropped: torch.Tensor
    mean_weight: torch.Tensor
    entropy: float
    top_1_probability: float
    active: torch.Tensor
    together: torch.Tensor
    groups: dict[str, torch.Tensor] = field(repr=False)

    @classmethod
    def of(cls, name: str, sums: LayerSums) -> "LayerStatistics":
        """The figures of a router's sums."""
        tokens = max(sums.num_tokens, 1)
        return cls(
            name=name,
            num_tokens=sums.num_tokens,
            choices=sums.choices,
            dropped=sums.dropped,
            mean_weight=sums.weight / sums.together.diagonal().clamp_min(1),
            entropy=sums.entropy / tokens,
            top_1_probability=sums.top_1 / tokens,
            active=sums.active,
            together=sums.together,
            groups=sums.groups,
        )

    @property
    def label(self) -> str:
        """The number of the layer."""
        return layer_label(self.name)

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.choices)

    @property
    def load(self) -> torch.Tensor:
        """(E,), choices of each expert over the mean of all: 1 is ideal."""
        return relative_load(self.choices)

    @property
    def max_violation(self) -> float:
        """The largest load minus 1 (https://huggingface.co/papers/2408.15664)."""
        return float(self.load.max()) - 1

    @property
    def relative_entropy(self) -> float:
        """Entropy in parts of ln E: 1 when undecided."""
        return self.entropy / math.log(self.num_experts) if self.num_experts > 1 else 0.0

    @property
    def usage(self) -> torch.Tensor:
        """(E,), the share of tokens that each expert served."""
        return self.together.diagonal().double() / max(self.num_tokens, 1)

    @property
    def mean_active(self) -> float:
        """Experts that served a token, mean over tokens."""
        return float(self.usage.sum())

    @property
    def dropped_share(self) -> float:
        """Choices that were not served over all choices."""
        return float(self.dropped.sum()) / max(float(self.choices.sum()), 1.0)

    @property
    def dead(self) -> list[int]:
        """Experts that no token chose."""
        return torch.where(self.choices == 0)[0].tolist()

    @property
    def saturated(self) -> list[int]:
        """Experts that serve at least 90% of the tokens, where an even share would be less."""
        if self.mean_active >= SATURATED_SHARE * self.num_experts:
            return []
        return torch.where(self.usage >= SATURATED_SHARE)[0].tolist()

    def co_activation(self) -> torch.Tensor:
        """(E, E) float64: of the tokens that the row's expert served, the share that the column's served too."""
        return self.together.double() / self.together.diagonal().clamp_min(1)[:, None]

    def strongest_pairs(self) -> list[tuple[int, int, float]]:
        """Up to 10 pairs (a, b, share of the layer's tokens that both served), the most frequent first."""
        upper = self.together.triu(1)
        counts, places = upper.flatten().sort(descending=True, stable=True)
        found = zip(places[:STRONGEST_PAIRS].tolist(), counts[:STRONGEST_PAIRS].tolist(), strict=True)
        pairs = [(*divmod(place, self.num_experts), count / max(self.num_tokens, 1)) for place, count in found]
        return [pair for pair in pairs if pair[2] > 0]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        names = ("name", "num_tokens", "num_experts", "entropy", "relative_entropy", "top_1_probability")
        figures = ("max_violation", "dropped_share", "mean_active", "dead", "saturated")
        tensors = ("choices", "dropped", "load", "usage", "mean_weight", "active")
        return {
            **{name: getattr(self, name) for name in (*names, *figures)},
            **{name: getattr(self, name).tolist() for name in tensors},
            "strongest_pairs": [list(pair) for pair in self.strongest_pairs()],
            **({"together": self.together.tolist()} if self.num_experts <= LARGEST_PAIR_TABLE else {}),
            "groups": {kind: table.tolist() for kind, table in self.groups.items()},
            "specialisation": {kind: specialisation(table) for kind, table in self.groups.items()},
        }


@dataclass(frozen=True)
class LayerChange:
    """How one router's choices differ from another checkpoint's on the same tokens.

    Attributes:
        overlap: choices that both made over those that either made; 1: no change.
        same_set: the share of tokens with the same experts.
        same_first: the share of tokens whose expert of the largest weight is the same.
        kept: (E,) float64, of the tokens that an expert served, the share that it serves in the other checkpoint too; NaN
            where it served none.
    """

    overlap: float
    same_set: float
    same_first: float
    kept: torch.Tensor

    @classmethod
    def of(cls, sums: ChangeSums) -> "LayerChange":
        """The figures of a router's sums."""
        tokens = max(sums.num_tokens, 1)
        kept = sums.kept.double() / sums.used
        return cls(sums.same_choices / max(sums.union, 1), sums.same_set / tokens, sums.same_first / tokens, kept)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        kept = [None if math.isnan(value) else value for value in self.kept.tolist()]
        return {"overlap": self.overlap, "same_set": self.same_set, "same_first": self.same_first, "kept": kept}


@dataclass(frozen=True)
class TextSample:
    """The head of a domain's text and the expert that each token gave the largest weight to.

    Attributes:
        domain: its name.
        token_ids: n ids.
        tokens: n texts, or None without a tokenizer.
        experts: (L, n) int64; -1 where no expert served a token.
    """

    domain: str
    token_ids: list[int]
    tokens: list[str] | None
    experts: torch.Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        fields = {"domain": self.domain, "token_ids": self.token_ids, "tokens": self.tokens}
        return fields | {"experts": self.experts.tolist()}


@dataclass(frozen=True)
class RoutingStatistics:
    """The figures of all routers of a model.

    Attributes:
        model: its name, as it was loaded, or its class.
        num_tokens: real tokens of the text.
        layers: one per MoE block, L.
        groups: by kind (`domain`, `position`, `token class`, `language`, ...), names of the groups of tokens.
        samples: the head of each domain's text.
        against: name of the checkpoint that the routing is compared with, or None.
        changes: how the routing differs from it, one per layer; empty without it.
        origin: name of the dense model that the experts were made from, or None.
        drift: by layer, the distance of each expert from how it was made from that model, relative, (E,) float64; empty
            without it.
    """

    model: str
    num_tokens: int
    layers: tuple[LayerStatistics, ...]
    groups: dict[str, tuple[str, ...]]
    samples: tuple[TextSample, ...] = ()
    against: str | None = None
    changes: tuple[LayerChange, ...] = ()
    origin: str | None = None
    drift: tuple[torch.Tensor, ...] = ()

    def summary(self) -> dict[str, Any]:
        """The figures of the model as a whole: means over its layers, unless they say otherwise."""
        worst = max(self.layers, key=lambda layer: layer.max_violation)
        figures = {
            "tokens": self.num_tokens,
            "layers": len(self.layers),
            "experts per layer": max(layer.num_experts for layer in self.layers),
            "mean active experts": _mean(layer.mean_active for layer in self.layers),
            "MaxVio": _mean(layer.max_violation for layer in self.layers),
            "MaxVio of the worst layer": worst.max_violation,
            "worst layer": worst.label,
            "entropy in parts of ln E": _mean(layer.relative_entropy for layer in self.layers),
            "top-1 probability": _mean(layer.top_1_probability for layer in self.layers),
            "dead experts in all layers": sum(len(layer.dead) for layer in self.layers),
            "saturated experts in all layers": sum(len(layer.saturated) for layer in self.layers),
            "dropped share": _mean(layer.dropped_share for layer in self.layers),
        }
        for kind, names in self.groups.items():
            if len(names) > 1:
                found = [specialisation(layer.groups[kind]) for layer in self.layers]
                figures[f"specialisation by {kind}"] = _mean(one["share"] for one in found)
                figures[f"specialisation by {kind}, chance"] = _mean(one["chance"] for one in found)
        if self.changes:
            figures["overlap with the other checkpoint"] = _mean(change.overlap for change in self.changes)
            figures["tokens with the same experts"] = _mean(change.same_set for change in self.changes)
        if self.drift:
            figures["drift from the dense origin"] = _mean(float(drift.mean()) for drift in self.drift)
            figures["largest drift"] = max(float(drift.max()) for drift in self.drift)
        return figures

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "format": FORMAT,
            "version": 1,
            "model": self.model,
            "summary": self.summary(),
            "groups": {kind: list(names) for kind, names in self.groups.items()},
            "layers": [layer.to_dict() for layer in self.layers],
            "against": self.against,
            "changes": [change.to_dict() for change in self.changes],
            "origin": self.origin,
            "drift": [drift.tolist() for drift in self.drift],
            "samples": [sample.to_dict() for sample in self.samples],
        }

    def save(self, path: str | Path) -> None:
        """Write the JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def figure_text(value: Any) -> str:
    """A figure as people read it."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def relative_load(counts: torch.Tensor) -> torch.Tensor:
    """The share of choices of each expert times E, in the last dimension: 1 where balanced, 0 where nothing was chosen."""
    return counts.double() * counts.shape[-1] / counts.sum(-1, keepdim=True).clamp_min(1)


def group_lift(counts: torch.Tensor) -> torch.Tensor:
    """How much more often a group chooses an expert than all tokens do, (G, E) -> (G, E): 1 for no difference.

    NaN for groups without tokens and experts that nobody chose.
    """
    shares = counts.double() / counts.sum(-1, keepdim=True)
    of_all = counts.sum(0).double() / counts.sum()
    return shares / of_all


def specialisation(counts: torch.Tensor) -> dict[str, float]:
    """How much the choice of an expert says about the group of the token, from a table of counts (G, E).

    Returns:
        `information`: mutual information of group and expert in nats; `share`: its part of the groups' entropy, 0 when
        experts say nothing, 1 when they tell the groups apart; `chance`: what `share` would be in expectation for experts
        that say nothing, on so many choices (the first order bias, (G - 1)(E - 1) / 2N).
    """
    joint = counts.double() / max(float(counts.sum()), 1.0)
    of_group, of_expert = joint.sum(1), joint.sum(0)
    entropy = float(-torch.special.xlogy(of_group, of_group).sum())
    both = float(-torch.special.xlogy(joint, joint).sum())
    information = max(entropy + float(-torch.special.xlogy(of_expert, of_expert).sum()) - both, 0.0)
    bias = (int((of_group > 0).sum()) - 1) * (int((of_expert > 0).sum()) - 1) / (2 * max(float(counts.sum()), 1.0))
    known = entropy > 0
    return {
        "information": information,
        "share": information / entropy if known else 0.0,
        "chance": bias / entropy if known else 0.0,
    }


def _mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)
