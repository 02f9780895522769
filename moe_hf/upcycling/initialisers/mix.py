"""Experts from several fine-tuned checkpoints of one dense family: Branch-Train-MiX and mixes of specialists.

Letters: F expert width, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

from moe_hf.dense_sources import TOKENIZER_FILES, load_dense_tokenizer
from moe_hf.errors import MoEError
from moe_hf.gguf_files import gguf_file_of
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite
from moe_hf.modeling.routing import wide
from moe_hf.unwrapping import unwrapped
from moe_hf.upcycling.initialisers.base import DenseLayer, Initialiser, all_neurons
from moe_hf.upcycling.recipes import ExpertRecipe


# Differences in these do not change what a checkpoint computes on the tokens that it can take.
HARMLESS_FIELDS = {"max_position_embeddings", "initializer_range", "use_cache"} | {
    name for name in PreTrainedConfig().to_dict() if name != "tie_word_embeddings"
}


@dataclass(frozen=True, kw_only=True)
class Mix(Initialiser):
    """Each expert is the MLP of one of several checkpoints that were fine-tuned from one dense model.

    Checkpoint 0 is the one that is upcycled, the base, and the others are `sources` 1, 2, ...; narrower MLPs are filled
    up with neurons of zeros. A shared expert is the base's MLP.

    Attributes:
        sources: the other checkpoints: folders, Hub ids, or models, which are recorded by their name.
        assignment: the checkpoint of each expert, E numbers; taken in turn, 0, 1, ..., 0, 1, ..., when not given.
        rest: `"average"`: the other parameters are the mean over the checkpoints that have an expert; `"base"`: they are
            those of checkpoint 0.
    """

    name: ClassVar[str] = "mix"
    equation: ClassVar[str] = "E_i(x) = FFN_a(i)(x), a = assignment; other parameters: mean over the a(i), or a = 0"
    paper: ClassVar[str] = "Branch-Train-MiX (https://huggingface.co/papers/2403.07816)"

    sources: tuple[str | Path | PreTrainedModel, ...] = ()
    assignment: tuple[int, ...] | None = None
    rest: str = "average"

    def __post_init__(self):
        if isinstance(self.sources, str | Path | PreTrainedModel) or not self.sources:
            raise MoEError(
                "init='mix' needs sources, a list of checkpoints besides the one that is upcycled; "
                f"got {self.sources!r}."
            )
        object.__setattr__(self, "sources", tuple(self.sources))
        if self.rest not in ("average", "base"):
            raise MoEError(f"rest of init='mix' is {self.rest!r}; it must be 'average' or 'base'.")
        if self.assignment is None:
            return
        object.__setattr__(self, "assignment", tuple(self.assignment))
        known = range(len(self.sources) + 1)
        if any(index not in known for index in self.assignment):
            raise MoEError(
                f"assignment of init='mix' is {list(self.assignment)}; each number must be in 0 to {len(self.sources)}: 0 "
                "for the checkpoint that is upcycled, then the sources in order."
            )

    @property
    def exact(self) -> bool:
        """Never: the experts are different functions."""
        return False

    def cost_at_start(self, config: MoEConfig) -> str:
        """Experts meet layers that they were not trained with."""
        return (
            "init='mix' puts MLPs of several models behind one attention, with routers that know none of them: train at least "
            "the routers, use rest='base', or sources that were trained less far from their common start."
        )

    def settled(self, config: MoEConfig) -> "Mix":
        """With the assignment written out."""
        if self.assignment is not None:
            return self
        count = len(self.sources) + 1
        return replace(self, assignment=tuple(expert % count for expert in range(config.num_experts)))

    def averaged(self, config: MoEConfig) -> tuple[int, ...]:
        """The checkpoints whose other parameters are averaged."""
        return (0,) if self.rest == "base" else tuple(sorted(set(self.settled(config).assignment)))

    def expert_width(self, dense_widths: tuple[int, ...], config: MoEConfig) -> int:
        """The widest checkpoint's."""
        return max(dense_widths)

    def check(self, config: MoEConfig) -> None:
        """Refuse an assignment that does not name each expert once, or leaves a source out."""
        assignment = self.settled(config).assignment
        if len(assignment) != config.num_experts:
            raise MoEError(
                f"assignment of init='mix' has {len(assignment)} numbers, and num_experts is {config.num_experts}; it needs "
                "one for each expert."
            )
        unused = [name for index, name in enumerate(self.options()["sources"], 1) if index not in assignment]
        if unused:
            raise MoEError(
                f"No expert of {config.num_experts} comes from {unused}: use more experts, another assignment, or fewer "
                "sources."
            )

    def experts(self, layer: DenseLayer, config: MoEConfig) -> list[ExpertRecipe]:
        """E recipes, each of all neurons of its checkpoint."""
        assignment = self.settled(config).assignment
        return [
            ExpertRecipe(source=source, neurons=all_neurons(layer.dense_widths[source], layer.width))
            for source in assignment
        ]

    def options(self) -> dict[str, Any]:
        """Its options as plain values; models by their names."""
        return {
            "sources": [source_name(source) for source in self.sources],
            "assignment": None if self.assignment is None else list(self.assignment),
            "rest": self.rest,
        }


def source_name(source: str | Path | PreTrainedModel) -> str:
    """What a checkpoint is called in metadata: its path or Hub id; of a model without one, its class."""
    source = unwrapped(source, or_path=True)
    if isinstance(source, PreTrainedModel):
        return source.name_or_path or type(source).__name__
    return str(source)


def average(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean of equally shaped tensors, computed in float32 or wider, in the first one's dtype.

    Integers, such as position ids, are the first one's.
    """
    first = tensors[0]
    if len(tensors) == 1 or not first.is_floating_point():
        return first
    total = wide(first).clone()
    for tensor in tensors[1:]:
        total += wide(tensor).to(total.device)
    return (total / len(tensors)).to(first.dtype)


def check_same_family(
    base: PreTrainedConfig,
    other: PreTrainedConfig,
    base_sites: Sequence[MLPSite],
    other_sites: Sequence[MLPSite],
    name: str,
) -> None:
    """Refuse a source that is not the base's sibling: all but the width of its MLPs must be equal.

    Args:
        base, other (`PreTrainedConfig`): configurations of the two dense models.
        base_sites, other_sites (`Sequence[MLPSite]`): their MLPs.
        name (`str`): of the source, for the message.

    Raises:
        MoEError: naming the fields that differ, and their values.
    """
    if type(base) is not type(other):
        raise MoEError(f"{name} is a {other.model_type} model and the base a {base.model_type}: one family is needed.")
    mine, its = base.to_dict(), other.to_dict()
    differing = {
        field: (mine.get(field), its.get(field))
        for field in sorted(mine.keys() | its.keys())
        if field not in HARMLESS_FIELDS and "drop" not in field and mine.get(field) != its.get(field)
    }
    differing = {
        field: (a, b)
        for field, (a, b) in differing.items()
        if not (_is_width(a, base_sites) and _is_width(b, other_sites))
    }
    layout = [[(s.layer_index, s.up, s.has_bias) for s in sites] for sites in (base_sites, other_sites)]
    if layout[0] != layout[1]:
        differing["layers with an MLP"] = tuple(layout)
    if differing:
        listed = ", ".join(f"{field} ({a!r} and {b!r})" for field, (a, b) in differing.items())
        raise MoEError(
            f"{name} differs from the base in {listed}: experts of one model must come from checkpoints of one "
            "architecture; only the width of their MLPs may differ."
        )


def _is_width(value: Any, sites: Sequence[MLPSite]) -> bool:
    """Whether a configuration's value, or each value of a list, is the width of an MLP."""
    widths = {site.intermediate_size for site in sites}
    return all(isinstance(v, int) and v in widths for v in (value if isinstance(value, list) else [value]))


def check_same_tensors(base: Mapping[str, tuple], other: Mapping[str, tuple], name: str) -> None:
    """Refuse a source whose tensors outside of the MLPs are not the base's.

    Args:
        base, other (`Mapping[str, tuple]`): shapes by name.
        name (`str`): of the source, for the message.

    Raises:
        MoEError: naming the tensors.
    """
    differing = sorted(key for key in base.keys() | other.keys() if base.get(key) != other.get(key))
    if differing:
        shapes = ", ".join(f"{key} ({base.get(key)} and {other.get(key)})" for key in differing[:4])
        raise MoEError(f"{name} does not have the base's tensors: {shapes}.")


def check_same_vocabulary(base: str, other: str) -> None:
    """Refuse a source that has a tokenizer of other words than the base's, where both have one.

    Raises:
        MoEError: with words that differ.
    """
    vocabularies = [_vocabulary(name) for name in (base, other)]
    if None in vocabularies:
        return
    differing = sorted(dict(vocabularies[0].items() ^ vocabularies[1].items()))
    if differing:
        raise MoEError(
            f"The tokenizers of {base} and {other} differ in {len(differing)} tokens, such as {differing[:4]}: their "
            "embeddings cannot be shared."
        )


def _vocabulary(name: str) -> dict[str, int] | None:
    folder = Path(name).expanduser()
    if gguf_file_of(folder) is not None:
        return load_dense_tokenizer(folder).get_vocab()
    has_files = folder.is_dir() and any((folder / file).exists() for file in TOKENIZER_FILES)
    return AutoTokenizer.from_pretrained(folder).get_vocab() if has_files else None
