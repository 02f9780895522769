"""The routing contract: what a routing function is told, what it answers, and how it is described.

A routing function decides which experts each token uses, and with what weights: `fn(router_logits, context) -> Routing`.
It keeps no state; its random draws, in training only, come from torch's global generator, so that a checkpointed layer
draws the same again.

Letters: B batch, S sequence, T = B * S tokens, D model width, E experts, K experts per token, R rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .configuration_moe import MoEConfig, MoEError


@dataclass(frozen=True)
class RouterNoise:
    """Noise that was added to the logits of one layer in one forward pass.

    Attributes:
        logits: the noisy logits, (T, E).
        std: standard deviation of the noise, (T, E) with a gradient where it is learned, or a scalar.
    """

    logits: torch.Tensor
    std: torch.Tensor


@dataclass(frozen=True)
class RoutingContext:
    """What a routing function may know besides the logits.

    Attributes:
        config: the model's configuration.
        layer_index: the decoder layer, from 0.
        hidden_states: the tokens, (T, D).
        training: whether the model is in training mode.
        batch_size, sequence_length: B and S of the batch in this forward pass.
        token_mask: (T,), True for real tokens, or None when there is no padding.
        positions: (T,), the place of each token in its sequence or document, from 0, padding not counted; None unless the
            arguments have `spread_ties`.
        document_ids: (T,), equal for tokens of one document in one row, and not falling; None when rows are not packed.
        ids: the id of each token, (T,), for the kinds that the configuration tells apart.
        open_experts: (T, E), False for experts that `expert_groups` closes to a token, whose logits are the least finite
            number; None when all are open.
        correction_bias: (E,), added to the scores for choosing only, or None.
        noise: the noise of this pass, in training with `router_noise`; otherwise None.
        arguments: `router_kwargs`, completed with the defaults of the routing function.
        parameters: the parameters of this layer's router besides its weight, by name.
        state: what this layer's router knows from earlier batches, by name, (E,) each.
        carried: with a cache, what this layer's router carried on from the earlier tokens of each row
            (`Routing.carry`), {} where there are none; None without a cache, when nothing is asked for.
    """

    config: MoEConfig
    layer_index: int
    hidden_states: torch.Tensor
    training: bool
    batch_size: int
    sequence_length: int
    token_mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    ids: dict[str, torch.Tensor] = field(default_factory=dict)
    open_experts: torch.Tensor | None = None
    correction_bias: torch.Tensor | None = None
    noise: RouterNoise | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    carried: dict[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class Routing:
    """The choice of a routing function.

    Attributes:
        top_k_index: expert ids, (T, K); always valid ids: a dropped choice has weight 0.
        top_k_weights: mixing weights, (T, K), float32 or wider.
        token_index: for a varying number of experts per token, the token of each of R rows, (R,); the other two are
            then (R, 1).
        segment_index: (T,), not falling: tokens whose experts are merged into one, with the weights of its first row; None
            where the experts' outputs are mixed.
        preferred_index: (T, K), the experts that tokens chose, where full ones sent them elsewhere; otherwise None.
        stats: figures to report, by name; scalars without a gradient.
        log_prob: logarithm of the probability with which this choice was drawn, (T,), with a gradient; None where
            nothing was drawn, or nothing asks for it.
        observed: what the router's state is updated from, by name, (E,) each without a gradient; they add up over
            forward passes and processes.
        carry: what the choices of later tokens of a row will depend on, by name, (B, ...) each, where
            `RoutingContext.carried` is not None. With packed rows it is about the last document of a row.
    """

    top_k_index: torch.Tensor
    top_k_weights: torch.Tensor
    token_index: torch.Tensor | None = None
    segment_index: torch.Tensor | None = None
    preferred_index: torch.Tensor | None = None
    stats: dict[str, torch.Tensor] = field(default_factory=dict)
    log_prob: torch.Tensor | None = None
    observed: dict[str, torch.Tensor] = field(default_factory=dict)
    carry: dict[str, torch.Tensor] = field(default_factory=dict)


RoutingFunction = Callable[[torch.Tensor, RoutingContext], Routing]


@dataclass(frozen=True)
class Argument:
    """One key of `router_kwargs`: its default, which values are allowed, in words and as a test.

    Without a test the routing function checks the value itself.
    """

    default: Any = None
    allowed: str = "anything"
    test: Callable[[Any], bool] | None = None


def resolve(given: dict[str, Any], known: dict[str, Argument], field_name: str, owner: str) -> dict[str, Any]:
    """The arguments in `given`, completed with the defaults of those that `owner` knows.

    Raises:
        MoEError: a key that `owner` does not read, or a value that it does not allow.
    """
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise MoEError(f"{field_name} has {unknown}, which {owner} does not read; it reads {sorted(known) or 'none'}.")
    arguments = {key: given.get(key, argument.default) for key, argument in known.items()}
    for key, argument in known.items():
        if argument.test is not None and not argument.test(arguments[key]):
            raise MoEError(f"{field_name}[{key!r}] is {arguments[key]!r}; it must be {argument.allowed}.")
    return arguments


@dataclass(frozen=True)
class RouterSpec:
    """A routing function and what it needs.

    Attributes:
        function: the routing function.
        arguments: the keys of `router_kwargs` that it reads.
        parameters: shapes of the parameters that the router has besides its weight, by name, in the letters "E" and
            "D"; they start at zero.
        options: which of `ROUTER_OPTIONS` it honours; a configuration that sets another one is refused.
        causal: whether a token's experts and weights depend on that token and earlier ones of its sequence alone; or a
            function of the configuration that says so.
        cacheable: whether decoding step by step with a cache computes what a full forward pass does.
        carries: whether it needs `Routing.carry` for that: its choices depend on earlier tokens of the sequence.
        merges_experts: whether it mixes the weights of experts, by `Routing.segment_index`, and not their outputs.
        check: raises `MoEError` for a configuration that the function cannot serve.
        state: names of (E,) float32 buffers that follow earlier batches; they start at zero and are saved.
        update: `fn(state, observed, arguments) -> state`, called once per optimizer step with the sums of
            `Routing.observed` since the last one.
    """

    function: RoutingFunction
    arguments: dict[str, Argument] = field(default_factory=dict)
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    options: frozenset[str] = frozenset()
    causal: bool | Callable[[MoEConfig], bool] = True
    cacheable: bool = True
    carries: bool = False
    merges_experts: bool = False
    check: Callable[[MoEConfig, dict[str, Any]], None] | None = None
    state: tuple[str, ...] = ()
    update: Callable[[dict, dict, dict[str, Any]], dict[str, torch.Tensor]] | None = None

    def is_causal(self, config: MoEConfig) -> bool:
        """Whether it is causal under `config`."""
        return self.causal(config) if callable(self.causal) else self.causal

    def resolve_arguments(self, config: MoEConfig) -> dict[str, Any]:
        """`config.router_kwargs`, completed with defaults.

        Raises:
            MoEError: a key that the function does not read, a value that it does not allow, or an option or a
                combination of fields that it does not serve.
        """
        name = config.router_type
        arguments = resolve(config.router_kwargs, self.arguments, "router_kwargs", f"router_type={name!r}")
        for option, (fields, is_set) in ROUTER_OPTIONS.items():
            if option not in self.options and is_set(config):
                raise MoEError(f"router_type={name!r} has no use for {fields}; leave it out, or use 'top_k'.")
        if self.check is not None:
            self.check(config, arguments)
        return arguments


# Fields of the configuration that some routing functions honour: what they are called, and whether they are set.
ROUTER_OPTIONS: dict[str, tuple[str, Callable[[MoEConfig], bool]]] = {
    "correction_bias": ("balance_strategy='bias'", lambda config: config.balance_strategy == "bias"),
    "noise": ("router_noise", lambda config: config.router_noise != "none"),
    "structure": (
        "num_experts_per_layer, expert_intermediate_sizes and extra_experts",
        lambda config: bool(config.num_experts_per_layer or config.expert_intermediate_sizes or config.extra_experts),
    ),
    "output_mixture": ("output_mixture", lambda config: config.output_mixture is not None),
    "groups": ("n_group and topk_group", lambda config: config.n_group is not None),
    "expert_groups": (
        "expert_groups without expert_group_prior",
        lambda config: bool(config.expert_groups) and config.expert_group_prior is None,
    ),
    "capacity": (
        "capacity_factor",
        lambda config: config.capacity_factor is not None or config.eval_capacity_factor is not None,
    ),
}


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` in float32, or in float64 when it is that."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def router_scores(router_logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Scores of the experts per token, (T, E), in float32 or wider: softmax over the experts, or sigmoids."""
    logits = wide(router_logits)
    return logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
