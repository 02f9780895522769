"""Router initialisers: what each expert's row of the router starts from.

A row of the router is a direction in the space of the MLP's inputs; its product with a token is the expert's logit.
`ROUTER_INITS` maps names to classes; where a `router_init` is expected, a name means its default options. How sharp
the routing starts is said by its entropy, which does not depend on the model's width or on the number of experts.

Letters: T tokens, D model width, E experts, G distinct rows: E, or the number of copies whose shards share a row.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn import functional

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.routing import wide
from moe_hf.upcycling.choices import Choice, make_choice
from moe_hf.upcycling.recipes import random_generator
from moe_hf.upcycling.router_init.entropy import num_tokens, scaled_to_entropy, some_tokens


KMEANS_ITERATIONS = 25
POOLINGS = ("last", "mean")


@dataclass(frozen=True, kw_only=True)
class RouterLayer:
    """What a router initialiser may know of a layer.

    Attributes:
        layer_index: the decoder layer, from 0.
        hidden_size: D.
        groups: G, the rows to make.
        config: of the MoE.
        seed: of all random numbers.
        hidden_states: the MLP's inputs on the user's tokens, (T, D); None when there are no tokens.
        prompt_states: the MLP's inputs on each of the initialiser's prompts, (T, D) each, in order.
    """

    layer_index: int
    hidden_size: int
    groups: int
    config: MoEConfig
    seed: int
    hidden_states: torch.Tensor | None = None
    prompt_states: Sequence[torch.Tensor] = ()

    def normal(self, *shape: int) -> torch.Tensor:
        """N(0, 1 / D), of the stream of random numbers of this layer's router."""
        generator = random_generator(self.seed, self.layer_index, "router")
        return torch.randn(shape, generator=generator, dtype=torch.float32) / self.hidden_size**0.5

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """The products of `rows` with tokens, (T, G) float64: the user's, or N(0, 1) ones, as norms without gain give."""
        rows = rows.double()
        if self.hidden_states is not None:
            return some_tokens(self.hidden_states, len(rows)) @ rows.t()
        # Drawn in the space that the rows span, in which their products are those with tokens of all D dimensions.
        span = torch.linalg.qr(rows.t(), mode="r").R  # (min(D, G), G)
        generator = random_generator(self.seed, self.layer_index, "router", "tokens")
        return torch.randn(num_tokens(len(rows)), len(span), generator=generator).double() @ span


@dataclass(frozen=True, kw_only=True)
class RouterInit(Choice, ABC):
    """Base of the router initialisers: a frozen dataclass whose fields are its options."""

    @property
    def needs_inputs(self) -> bool:
        """Whether `hidden_states` are required."""
        return False

    @property
    def uses_inputs(self) -> bool:
        """Whether the rows depend on `hidden_states` where they are given."""
        return self.needs_inputs

    @property
    def prompts(self) -> tuple[str, ...]:
        """The texts whose hidden states are required as `prompt_states`."""
        return ()

    def check(self, config: MoEConfig, groups: int) -> None:
        """Refuse a configuration for which this initialiser has no rows.

        Raises:
            MoEError: with the option to change.
        """

    @abstractmethod
    def rows(self, layer: RouterLayer) -> torch.Tensor:
        """The rows of one layer's router, (G, D) float32; the caller repeats a row for the shards of one copy."""


@dataclass(frozen=True, kw_only=True)
class NormalRouter(RouterInit):
    """Random directions whose logits have a standard deviation of `std` on normalised tokens, whatever the width."""

    name: ClassVar[str] = "normal"
    equation: ClassVar[str] = "r_i ~ N(0, std^2 / D)"
    paper: ClassVar[str] = "scaled to unit variance of the logits, as in LeCun et al., Efficient BackProp (1998), 4.6"

    std: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.std) and self.std > 0):
            raise MoEError(
                f'std of router_init="normal" is {self.std}; it must be above 0. See "zero" for small rows.'
            )

    def rows(self, layer: RouterLayer) -> torch.Tensor:
        """(G, D), random."""
        return layer.normal(layer.groups, layer.hidden_size) * self.std


@dataclass(frozen=True, kw_only=True)
class EntropyRouter(RouterInit):
    """Random directions, as long as gives the scores a mean entropy of `target`, on the user's tokens if there are any."""

    name: ClassVar[str] = "entropy"
    equation: ClassVar[str] = "r_i = c z_i, z_i ~ N(0, 1 / D), mean over tokens of H(p(x)) = target ln G"
    paper: ClassVar[str] = "bisection of c; entropy as the measure of saturation"

    target: float = 0.9

    def __post_init__(self):
        _check_entropy(self.name, "target", self.target)

    @property
    def uses_inputs(self) -> bool:
        """They take the place of Gaussian tokens."""
        return True

    def rows(self, layer: RouterLayer) -> torch.Tensor:
        """(G, D), random."""
        rows = layer.normal(layer.groups, layer.hidden_size)
        return scaled_to_entropy(rows, layer.logits(rows), self.target, layer.config.scoring_func)


@dataclass(frozen=True, kw_only=True)
class KMeansRouter(RouterInit):
    """The centres of the user's tokens: each expert starts with the tokens of one cluster.

    The clusters are those of directions, since a router without a bias tells nothing else apart: the row with the
    largest product is the nearest centre. LLaMA-MoE v2 clusters the inputs of whole layers, which the router does not
    see, and evens the sizes of the clusters out; here the load-balancing loss is left to do that.
    """

    name: ClassVar[str] = "kmeans"
    equation: ClassVar[str] = (
        "r_i = c (m_i - mean_j m_j), m_i the unit centres of spherical k-means of the MLP's inputs, mean H(p(x)) = entropy ln G"
    )
    paper: ClassVar[str] = (
        "LLaMA-MoE v2, gates from k-means of hidden states (https://github.com/OpenSparseLLMs/LLaMA-MoE-v2); start: "
        "k-means++, Arthur and Vassilvitskii (2007)"
    )

    entropy: float = 0.9

    def __post_init__(self):
        _check_entropy(self.name, "entropy", self.entropy)

    @property
    def needs_inputs(self) -> bool:
        """The tokens that are clustered."""
        return True

    def rows(self, layer: RouterLayer) -> torch.Tensor:
        """(G, D): the centres, less their mean, which moves all logits of a token alike."""
        if layer.hidden_states is None:
            raise MoEError('router_init="kmeans" clusters the user\'s tokens: pass inputs, token ids (B, S).')
        generator = random_generator(layer.seed, layer.layer_index, "router", "kmeans")
        rows = _centred(spherical_kmeans(layer.hidden_states, layer.groups, generator))
        return scaled_to_entropy(rows, layer.logits(rows), self.entropy, layer.config.scoring_func)


@dataclass(frozen=True, kw_only=True)
class PromptRouter(RouterInit):
    """What tells the texts of one expert from those of the others: the direction of its prompts' hidden states.

    As mode "hidden" of mergekit-moe, with three differences: the states are the router's own inputs, behind the norm,
    not those of the residual stream; each prompt runs alone, so that padding has no part; and the rows have the length
    that gives the mean entropy asked for.

    Attributes:
        positive: for each expert, or copy, the prompts that it is for.
        negative: for each of them, prompts that it is not for; may be left out.
        pooling: of a prompt's tokens, `"last"` or `"mean"`; mergekit's "hidden" takes the last, "hidden_avg" the mean.
        entropy: mean entropy of the scores over the prompts' tokens, or the user's if there are any, in parts of ln G.
    """

    name: ClassVar[str] = "prompts"
    equation: ClassVar[str] = (
        "r_i = c (d_i - mean_j d_j), d_i = (mean_p h(p) - mean_n h(n)) / ||.||, mean H(p(x)) = entropy ln G"
    )
    paper: ClassVar[str] = (
        "mergekit-moe, gate_mode hidden (https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md)"
    )

    positive: Sequence[Sequence[str]]
    negative: Sequence[Sequence[str]] = ()
    pooling: str = "last"
    entropy: float = 0.9

    def __post_init__(self):
        _check_entropy(self.name, "entropy", self.entropy)
        if self.pooling not in POOLINGS:
            raise MoEError(
                f'pooling of router_init="prompts" is {self.pooling!r}; it must be one of {list(POOLINGS)}.'
            )
        for name in ("positive", "negative"):
            lists = getattr(self, name)
            if isinstance(lists, str) or any(isinstance(prompts, str) for prompts in lists):
                raise MoEError(f'{name} of router_init="prompts" must be a list of prompts for each expert.')
            object.__setattr__(self, name, tuple(tuple(prompts) for prompts in lists))
        if not self.positive or not all(self.positive):
            raise MoEError('router_init="prompts" needs at least one positive prompt for each expert.')
        if self.negative and len(self.negative) != len(self.positive):
            raise MoEError(
                f'router_init="prompts" got positive prompts for {len(self.positive)} experts and negative ones for '
                f"{len(self.negative)}; leave negative out, or give a list, which may be empty, for each."
            )
        pairs = list(zip(self.positive, self.negative or [()] * len(self.positive), strict=True))
        same = [index for index, pair in enumerate(pairs) if pair in pairs[:index]]
        if same:
            raise MoEError(
                f'router_init="prompts": expert {same[0]} has the prompts of one before it; nothing parts them.'
            )

    @property
    def uses_inputs(self) -> bool:
        """The rows' length is chosen on them."""
        return True

    @property
    def prompts(self) -> tuple[str, ...]:
        """The positive ones, then the negative ones."""
        return tuple(prompt for lists in (self.positive, self.negative) for prompts in lists for prompt in prompts)

    def check(self, config: MoEConfig, groups: int) -> None:
        """Refuse prompts for another number of experts."""
        if len(self.positive) != groups:
            raise MoEError(
                f'router_init="prompts" has prompts for {len(self.positive)} experts, and the model has {groups}'
                + (f" copies of {config.num_experts // groups} shards" if groups != config.num_experts else "")
                + ": give one list for each."
            )

    def rows(self, layer: RouterLayer) -> torch.Tensor:
        """(G, D): what distinguishes each expert's prompts."""
        states = iter(layer.prompt_states)
        pooled, texts = [], []
        for lists in (self.positive, self.negative):
            means = []
            for prompts in lists:
                tokens = [wide(next(states)) for _ in prompts]
                texts += tokens
                rows = [one[-1] if self.pooling == "last" else one.mean(0) for one in tokens]
                means.append(torch.stack(rows).mean(0) if rows else torch.zeros(layer.hidden_size))
            pooled.append(torch.stack(means) if means else torch.zeros(layer.groups, layer.hidden_size))
        rows = _centred(functional.normalize(pooled[0] - pooled[1], dim=-1))
        own = layer.hidden_states is None
        logits = some_tokens(torch.cat(texts), len(rows)) @ rows.double().t() if own else layer.logits(rows)
        return scaled_to_entropy(rows, logits, self.entropy, layer.config.scoring_func)

    def options(self) -> dict[str, Any]:
        """Its options, with lists in place of tuples, as a JSON file has them."""
        lists = {name: [list(prompts) for prompts in getattr(self, name)] for name in ("positive", "negative")}
        return super().options() | lists


@dataclass(frozen=True, kw_only=True)
class ZeroRouter(RouterInit):
    """Nearly no preference: rows of zeros, with noise that decides between equal experts.

    With `noise=0` the weights of a token are the same for all tokens, so that any of them can be exact, K = 1 too; tokens
    take the experts in turn until training moves the rows (`router_kwargs={"spread_ties": True}`, which is set).
    """

    name: ClassVar[str] = "zero"
    equation: ClassVar[str] = "r_i ~ N(0, noise^2 / D)"
    paper: ClassVar[str] = "uniform routing at the start, as router weights of a small standard deviation give"

    noise: float = 1e-3

    def __post_init__(self):
        if not (math.isfinite(self.noise) and self.noise >= 0):
            raise MoEError(f'noise of router_init="zero" is {self.noise}; it must be finite and at least 0.')

    def check(self, config: MoEConfig, groups: int) -> None:
        """Refuse zeros alone where nothing spreads the tokens, all of which they score alike."""
        if not self.spreads_ties(config):
            return
        found = spreads_no_ties(config)
        if found:
            raise MoEError(
                f'router_init="zero" with noise=0 makes all logits equal, and {", ".join(found)} would give all tokens the same '
                "experts, so that the others get no gradient. Give it some noise, such as 1e-3."
            )

    def spreads_ties(self, config: MoEConfig) -> bool:
        """Whether tokens must take the experts in turn, since the router scores all of them alike."""
        return self.noise == 0 and config.num_experts_per_tok < config.num_experts

    def rows(self, layer: RouterLayer) -> torch.Tensor:
        """(G, D), small."""
        return layer.normal(layer.groups, layer.hidden_size) * self.noise


def spreads_no_ties(config: MoEConfig) -> list[str]:
    """The fields, as `name=value`, with which tokens do not take experts in turn that a router of zeros scores alike."""
    holds = {
        "router_type": config.router_type != "top_k",
        "n_group": config.n_group is not None,
        "expert_groups": bool(config.expert_groups),
        "routing_level": config.routing_level == "task",
        "router_arch": config.router_arch != "linear",
    }
    return [f"{name}={getattr(config, name)!r}" for name, does in holds.items() if does]


ROUTER_INITS: dict[str, type[RouterInit]] = {
    cls.name: cls for cls in (NormalRouter, EntropyRouter, KMeansRouter, PromptRouter, ZeroRouter)
}


def make_router_init(router_init: str | RouterInit, options: Mapping[str, Any] | None = None) -> RouterInit:
    """The router initialiser that `router_init` names, with its options; an instance is returned as it is.

    Raises:
        MoEError: for an unknown name or option, or a value outside its range.
    """
    return make_choice("router_init", router_init, options, ROUTER_INITS, RouterInit)


@torch.no_grad()
def spherical_kmeans(points: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Unit centres of `count` clusters of directions, (count, D) float32, on the CPU.

    Lloyd's iterations from a k-means++ start; a point belongs to the centre with the largest cosine.

    Args:
        points (`torch.Tensor`): (n, D), any float dtype.
        count (`int`): of clusters.
        generator (`torch.Generator`): on the CPU.

    Raises:
        MoEError: when the points have fewer distinct directions than `count`.
    """
    points = functional.normalize(points.float().cpu(), dim=-1)
    centres = points[torch.randint(len(points), (1,), generator=generator)]
    distance = 1 - points @ centres[0]
    trials = 2 + int(math.log(count))
    while len(centres) < count:
        # Between two places of one token, float32 leaves some 1e-7.
        far = torch.where(distance > 1e-6, distance, 0)
        if not far.any():
            raise MoEError(
                f"The {len(points)} tokens have {len(centres)} distinct hidden states, fewer than the {count} clusters asked "
                "for: give more text as inputs, or use another router_init."
            )
        # Of some candidates the best: with one, two centres in a cluster are common, and Lloyd's steps do not part them.
        candidates = points[torch.multinomial(far, trials, replacement=True, generator=generator)]
        nearest = torch.minimum(distance[:, None], 1 - points @ candidates.t())  # (n, trials)
        best = int(nearest.sum(0).argmin())
        centres, distance = torch.cat([centres, candidates[best : best + 1]]), nearest[:, best]
    for _ in range(KMEANS_ITERATIONS):
        labels = (points @ centres.t()).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        moved = functional.normalize(sums, dim=-1)
        # A centre without points stays where it is.
        centres, before = torch.where(sums.any(-1, keepdim=True), moved, centres), centres
        if torch.equal(centres, before):
            break
    return centres


def _centred(rows: torch.Tensor) -> torch.Tensor:
    return rows - rows.mean(0)


def _check_entropy(name: str, option: str, value: float) -> None:
    if not 0 < value < 1:
        raise MoEError(
            f"{option} of router_init={name!r} is {value}; it must be above 0 and below 1, in parts of ln E."
        )
