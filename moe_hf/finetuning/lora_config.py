"""Which experts get a low-rank adapter, of which rank, and how it is scaled."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_selection import ExpertSelection


TARGETS = ("gate_up_proj", "up_proj", "down_proj")


@dataclass
class ExpertLoraConfig:
    """Low-rank adapters of experts: W_e becomes W_e + scale * B_e A_e, with A (rank, in) and B (out, rank).

    Attributes:
        r: rank.
        alpha: the scale is alpha / rank.
        dropout: share of an adapter's inputs that are dropped in training, drawn for each row; 0 to 1.
        use_rslora: the scale is alpha / sqrt(rank) (https://huggingface.co/papers/2312.03732).
        use_dora: W + scale * B A is divided by the norms of its rows and multiplied by a learned magnitude; the norms count
            as constants in the backward pass (https://huggingface.co/papers/2402.09353, section 4.3).
        rank_pattern: ranks of some experts, by `layer.expert` with `*` for any: `{"*.3": 16, "0.*": 4}`; the last match counts.
        experts: which experts: an [`ExpertSelection`], `{layer: [ids]}` or the path of its JSON file. None: all.
        target: which maps: `gate_up_proj` (`up_proj` where there is no gate) and `down_proj`.
        seed: of the initial A. The numbers depend on (seed, layer, expert, map) alone; B starts at 0.
    """

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    experts: ExpertSelection | Mapping[str, Any] | str | Path | None = None
    target: tuple[str, ...] = TARGETS
    seed: int = 0

    def __post_init__(self) -> None:
        self.target = (self.target,) if isinstance(self.target, str) else tuple(self.target)
        if not isinstance(self.rank_pattern, Mapping) or not all(isinstance(key, str) for key in self.rank_pattern):
            raise MoEError(f"rank_pattern is {self.rank_pattern!r}; a map of 'layer.expert' to ranks is expected.")
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": rank for key, rank in self.rank_pattern.items()}
        for where, rank in ranks.items():
            if type(rank) is not int or rank < 1:
                raise MoEError(f"{where} is {rank!r}; a rank is a whole number of at least 1.")
        for name in ("dropout", "alpha"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise MoEError(f"{name} is {value!r}; it must be a number.")
        for name, kind in (("use_rslora", bool), ("use_dora", bool), ("seed", int)):
            if type(getattr(self, name)) is not kind:
                raise MoEError(f"{name} is {getattr(self, name)!r}; it must be of type {kind.__name__}.")
        if not 0 <= self.dropout < 1:
            raise MoEError(f"dropout is {self.dropout!r}; it must be in [0, 1).")
        if not 0 < self.alpha < math.inf:
            raise MoEError(f"alpha is {self.alpha!r}; it must be above 0 and finite.")
        unknown = [name for name in self.target if name not in TARGETS]
        if unknown or not self.target:
            raise MoEError(f"target is {self.target!r}; it must be some of {', '.join(TARGETS)}.")

    def rank_of(self, layer: str, expert: int) -> int:
        """The rank of one expert; `layer` is the number of its layer."""
        rank = self.r
        for pattern, value in self.rank_pattern.items():
            if fnmatchcase(f"{layer}.{expert}", pattern):
                rank = value
        return rank

    def scale_of(self, rank: int) -> float:
        """What B A of this rank is multiplied by."""
        return self.alpha / (rank**0.5 if self.use_rslora else rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; the selection by its content."""
        values = asdict(self) | {"target": list(self.target)}
        values["experts"] = None if self.experts is None else ExpertSelection.load(self.experts).to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ExpertLoraConfig":
        """The inverse of `to_dict`.

        Raises:
            MoEError: a field that there is not, or a value that is not allowed.
        """
        try:
            return cls(**dict(values))
        except (TypeError, ValueError) as error:
            if isinstance(error, MoEError):
                raise
            raise MoEError(f"{json.dumps(values, default=str)} does not describe an adapter: {error}.") from error
