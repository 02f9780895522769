"""Initialisers whose experts hold, alone or a group of them together, the whole dense MLP.

Letters: F expert width, E experts, K experts per token, G shards.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.upcycling.initialisers.base import DenseLayer, Initialiser, all_neurons, check_ratio, fill_up, redrawn
from moe_hf.upcycling.recipes import ExpertRecipe


@dataclass(frozen=True, kw_only=True)
class Copy(Initialiser):
    """Each expert is the dense MLP; wider experts are filled up with neurons of zeros, which stay zero in training."""

    name: ClassVar[str] = "copy"
    equation: ClassVar[str] = "E_i(x) = FFN(x)"
    paper: ClassVar[str] = "sparse upcycling (https://huggingface.co/papers/2212.05055)"

    def experts(self, layer: DenseLayer, config: MoEConfig) -> list[ExpertRecipe]:
        """E recipes that take all neurons in order."""
        neurons = all_neurons(layer.site.intermediate_size, layer.width)
        return [ExpertRecipe(neurons=neurons)] * config.num_experts


@dataclass(frozen=True, kw_only=True)
class PartlyRedrawn(Initialiser):
    """Base of those that can draw the part `ratio` of each expert's neurons anew."""

    ratio: float = 0.0

    def __post_init__(self):
        check_ratio(self.name, self.ratio)

    @property
    def exact(self) -> bool:
        """Only when nothing is drawn anew."""
        return self.ratio == 0

    def cost_at_start(self, config: MoEConfig) -> str:
        """Neurons drawn anew know nothing."""
        if self.exact:
            return ""
        return (
            f"init={self.name!r} draws {self.ratio:.0%} of all neurons anew: Drop-Upcycling trained up to 500 B tokens after "
            "it. For a short training use a smaller ratio, or init='copy', 'permute' or 'granular' with ratio=0, which lose "
            "nothing."
        )


@dataclass(frozen=True, kw_only=True)
class Drop(PartlyRedrawn):
    """Each expert is the dense MLP with a part of its neurons drawn anew, so that experts differ from the start.

    Attributes:
        ratio: the part of the neurons.
        shared_indices: one set of neurons for gate, up and down, as in the paper, so that 1 - ratio of them stay intact;
            otherwise a set for each, as in the authors' scripts, so that (1 - ratio)^3 stay intact.
    """

    name: ClassVar[str] = "drop"
    equation: ClassVar[str] = (
        "E_i(x) = FFN(x) with floor(ratio F) neurons of each projection W, S_i, replaced: W[S_i] ~ N(mean(W[S_i]), std(W[S_i]))"
    )
    paper: ClassVar[str] = "Drop-Upcycling (https://huggingface.co/papers/2502.19261)"

    ratio: float = 0.5
    shared_indices: bool = True

    def experts(self, layer: DenseLayer, config: MoEConfig) -> list[ExpertRecipe]:
        """E recipes that take all neurons in order, some of them drawn anew."""
        width = layer.site.intermediate_size
        neurons = all_neurons(width, layer.width)
        return [
            ExpertRecipe(neurons=neurons, redrawn=redrawn(layer, expert, width, self.ratio, self.shared_indices))
            for expert in range(config.num_experts)
        ]


@dataclass(frozen=True, kw_only=True)
class Permute(PartlyRedrawn):
    """Each expert has the dense neurons in an order of its own, which changes nothing, and a part of them drawn anew.

    Attributes:
        ratio: the part of the neurons that is drawn anew.
    """

    name: ClassVar[str] = "permute"
    equation: ClassVar[str] = (
        "E_i(x) = FFN(x), neurons in order P_i; floor(ratio F) of them replaced: W[S_i] ~ N(mean(W[S_i]), std(W[S_i]))"
    )
    paper: ClassVar[str] = "Qwen1.5-MoE (https://qwenlm.github.io/blog/qwen-moe)"

    def experts(self, layer: DenseLayer, config: MoEConfig) -> list[ExpertRecipe]:
        """E recipes that take all neurons, each in a random order."""
        width = layer.site.intermediate_size
        return [
            ExpertRecipe(
                neurons=fill_up(permutation(layer, expert), layer.width),
                redrawn=redrawn(layer, expert, width, self.ratio, shared_indices=True),
            )
            for expert in range(config.num_experts)
        ]


@dataclass(frozen=True, kw_only=True)
class Granular(PartlyRedrawn):
    """Each copy of the dense MLP is cut into G experts of a G-th of its width, which are chosen together at the start.

    The G shards of a copy are neighbours (expert e belongs to copy e // G) and have one router row, so that they enter
    the top K together. Each then has a G-th of its copy's weight, which a factor G on its output makes up for: exactly,
    whatever the activation, since `down_proj` is linear. With `routed_scaling_factor` = G no weight changes at all. After
    the first training step the shards of a copy are experts of their own.

    Attributes:
        shards: G, experts that a copy is cut into; `num_experts` and `num_experts_per_tok` are multiples of it.
        permute: cut each copy in a random order of its neurons, so that copies differ.
        ratio: the part of each expert's neurons that is drawn anew.
    """

    name: ClassVar[str] = "granular"
    equation: ClassVar[str] = "E_(cG+g)(x) = G FFN_g(x), sum_g FFN_g = FFN, router rows r_(cG+g) = r_c"
    paper: ClassVar[str] = (
        "virtual group of https://huggingface.co/papers/2410.07524 with the scale on down_proj alone"
    )

    shards: int = 2
    permute: bool = False

    def __post_init__(self):
        if self.shards < 1:
            raise MoEError(f"shards of init='granular' is {self.shards}; it must be at least 1.")
        super().__post_init__()

    def expert_width(self, dense_widths: tuple[int, ...], config: MoEConfig) -> int:
        """A G-th of the dense width."""
        dense_width = dense_widths[0]
        if dense_width % self.shards:
            divisors = [d for d in range(2, 65) if dense_width % d == 0]
            raise MoEError(
                f"init='granular' cannot cut a dense MLP of width {dense_width} into shards={self.shards} equal parts; "
                f"its divisors up to 64 are {divisors or 'none'}."
            )
        return dense_width // self.shards

    def output_scale(self, config: MoEConfig) -> float:
        """G."""
        return float(self.shards)

    def check(self, config: MoEConfig) -> None:
        """Refuse counts that are no multiples of G."""
        for name in ("num_experts", "num_experts_per_tok"):
            value = getattr(config, name)
            if value % self.shards:
                raise MoEError(
                    f"{name} is {value}; init='granular' with shards={self.shards} needs a multiple of {self.shards}, since "
                    "the shards of a copy are chosen together."
                )

    def experts(self, layer: DenseLayer, config: MoEConfig) -> list[ExpertRecipe]:
        """E recipes, G neighbours for each copy."""
        part = self.expert_width(layer.dense_widths, config)
        recipes = []
        for copy in range(config.num_experts // self.shards):
            order = permutation(layer, copy) if self.permute else torch.arange(layer.site.intermediate_size)
            for shard, neurons in enumerate(order.split(part)):
                expert = copy * self.shards + shard
                recipes.append(
                    ExpertRecipe(
                        neurons=fill_up(neurons, layer.width),
                        redrawn=redrawn(layer, expert, part, self.ratio, shared_indices=True),
                    )
                )
        return recipes


def permutation(layer: DenseLayer, copy: int) -> torch.Tensor:
    """A random order of the dense neurons, (F,), for one of the copies."""
    return torch.randperm(layer.site.intermediate_size, generator=layer.generator(copy, "permutation"))
