"""What the routing fields of a configuration may be, alone and together.

Letters: E experts, K experts per token.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from huggingface_hub.errors import StrictDataclassError


SCORING_FUNCTIONS = ("softmax", "sigmoid")
ROUTER_NOISES = ("none", "gaussian", "uniform", "gumbel", "learned")
NOISE_AFFECTS = ("selection", "both")
OVERFLOW_POLICIES = ("drop", "reroute")
CAPACITY_ORDERS = ("token_major", "choice_major", "batch_prioritized")
BALANCE_STRATEGIES = ("loss", "bias")
BALANCE_LOSS_SCOPES = ("micro_batch", "sequence", "global_batch")
DENSE_FFN_PLACES = (None, "before", "after")
LOAD_ESTIMATORS = ("shazeer", "vmoe")
# Routers whose weights are the scores themselves, unless `norm_topk_prob=True`.
UNNORMALISED = ("top_p", "expert_choice", "expert_threshold", "bernoulli")
# The losses that `router_loss_coefs` may name, and the keys of `router_loss_kwargs` that each reads.
FURTHER_LOSSES: dict[str, tuple[str, ...]] = {
    "importance_loss": ("load_estimator",),
    "load_loss": ("load_estimator",),
    "local_entropy_loss": (),
    "global_entropy_loss": ("global_entropy_min_experts",),
    "device_balance_loss": ("num_device_groups",),
    "sparsity_loss": (),
    "gate_variance_loss": (),
    "policy_gradient_loss": (),
}


class MoEError(ValueError):
    """A user's mistake: says what was given, what is allowed, and what to do."""


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that a user may have meant by `name`; None where none is near."""
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.5)), None)


def raise_moe_errors(function):
    """Re-raise the errors of strict dataclasses as `MoEError`, so that users catch one type."""

    @wraps(function)
    def wrapper(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except StrictDataclassError as error:
            cause = error.__cause__
            raise (cause if isinstance(cause, MoEError) else MoEError(str(error))) from error
        except MoEError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # transformers reads some fields before it checks their types.
            raise MoEError(f"A field has the wrong type or value: {type(error).__name__}: {error}.") from error

    return wrapper


def _check_member(config: Any, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(config, name) not in allowed:
        raise MoEError(f"{name} is {getattr(config, name)!r}; it must be one of {list(allowed)}.")


def _check_number(config: Any, name: str, *, zero: bool) -> None:
    """A finite number above 0, or from 0; None passes."""
    value = getattr(config, name)
    if value is not None and not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        raise MoEError(f"{name} is {value}; it must be finite and {'at least' if zero else 'above'} 0.")


def check_experts_per_token(config: Any) -> None:
    """The number of experts, and how a token's experts are scored and weighted."""
    if config.num_experts < 1:
        raise MoEError(f"num_experts is {config.num_experts}; it must be at least 1.")
    if not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise MoEError(
            f"num_experts_per_tok is {config.num_experts_per_tok}; it must be between 1 and "
            f"num_experts = {config.num_experts}."
        )
    if config.norm_topk_prob and config.num_experts_per_tok == 1 and config.num_experts > 1:
        raise MoEError(
            "norm_topk_prob=True with num_experts_per_tok=1 makes every weight 1, so the router gets no gradient "
            "and never learns. Leave norm_topk_prob out, or use num_experts_per_tok >= 2."
        )
    _check_member(config, "scoring_func", SCORING_FUNCTIONS)
    _check_number(config, "routed_scaling_factor", zero=False)


def check_groups(config: Any) -> None:
    """Groups of experts, `n_group` of which `topk_group` are open to a token."""
    groups, open_groups = config.n_group, config.topk_group
    if (groups is None) != (open_groups is None):
        raise MoEError(f"n_group is {groups} and topk_group is {open_groups}; set both, or neither.")
    if groups is None:
        return
    if groups < 1 or config.num_experts % groups:
        raise MoEError(f"n_group is {groups}; it must divide num_experts = {config.num_experts}.")
    if not 1 <= open_groups <= groups:
        raise MoEError(f"topk_group is {open_groups}; it must be between 1 and n_group = {groups}.")
    experts = open_groups * config.num_experts // groups
    if experts < config.num_experts_per_tok:
        raise MoEError(
            f"topk_group={open_groups} of n_group={groups} groups have {experts} experts, fewer than "
            f"num_experts_per_tok={config.num_experts_per_tok}; open more groups."
        )


def check_noise(config: Any) -> None:
    """Noise on the router's input and on its logits."""
    if not 0 <= config.router_jitter_noise < 1:
        raise MoEError(f"router_jitter_noise is {config.router_jitter_noise}; it must be in [0, 1).")
    _check_member(config, "router_noise", ROUTER_NOISES)
    _check_number(config, "router_noise_scale", zero=True)
    _check_member(config, "router_noise_affects", NOISE_AFFECTS)
    if config.router_noise == "learned" and config.router_noise_affects == "selection":
        raise MoEError(
            "router_noise='learned' learns through the weights of the experts: it needs router_noise_affects='both'."
        )


def check_capacity(config: Any) -> None:
    """How many tokens an expert takes."""
    _check_number(config, "capacity_factor", zero=False)
    _check_number(config, "eval_capacity_factor", zero=False)
    if config.min_expert_capacity < 1:
        raise MoEError(f"min_expert_capacity is {config.min_expert_capacity}; it must be at least 1.")
    _check_member(config, "overflow_policy", OVERFLOW_POLICIES)
    _check_member(config, "capacity_order", CAPACITY_ORDERS)
    if config.capacity_order == "token_major":
        return
    if not config.allow_noncausal_routing:
        raise MoEError(
            f"capacity_order={config.capacity_order!r} lets a later token take the slot of an earlier one. Use "
            "'token_major', or set allow_noncausal_routing=True."
        )
    if config.overflow_policy == "reroute":
        raise MoEError("overflow_policy='reroute' goes through the tokens in order: use capacity_order='token_major'.")


def check_balance(config: Any) -> None:
    """How the load of the experts is balanced: the losses and their coefficients, and the correction bias."""
    _check_member(config, "balance_strategy", BALANCE_STRATEGIES)
    _check_member(config, "balance_loss_scope", BALANCE_LOSS_SCOPES)
    for name in ("router_aux_loss_coef", "router_z_loss_coef", "bias_update_rate"):
        _check_number(config, name, zero=True)
    if config.balance_strategy == "bias" and config.balance_loss_scope == "global_batch":
        raise MoEError(
            "balance_strategy='bias' balances the global batch already: use it with balance_loss_scope 'micro_batch' or "
            "'sequence'."
        )
    coefficients = config.router_loss_coefs
    for name, value in coefficients.items():
        if name not in FURTHER_LOSSES:
            raise MoEError(f"router_loss_coefs names {name!r}; it may name {list(FURTHER_LOSSES)}.")
        if not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
            raise MoEError(f"router_loss_coefs[{name!r}] is {value!r}; it must be finite and at least 0.")
    known = {key for name in coefficients for key in FURTHER_LOSSES[name]}
    if config.extra_experts:
        known.add("extra_expert_penalty")
        penalty = config.router_loss_kwargs.get("extra_expert_penalty", 1.0)
        if not isinstance(penalty, int | float) or not (math.isfinite(penalty) and penalty > 0):
            raise MoEError(f"extra_expert_penalty is {penalty!r}; it must be finite and above 0.")
    for key in config.router_loss_kwargs:
        if key not in known:
            raise MoEError(
                f"router_loss_kwargs has {key!r}, which no loss in router_loss_coefs reads; they read {sorted(known)}."
            )
    _check_loss_arguments(config)


def _check_loss_arguments(config: Any) -> None:
    coefficients, arguments, experts = config.router_loss_coefs, config.router_loss_kwargs, config.num_experts
    estimator = arguments.get("load_estimator", "shazeer")
    if estimator not in LOAD_ESTIMATORS:
        raise MoEError(f"load_estimator is {estimator!r}; it must be one of {list(LOAD_ESTIMATORS)}.")
    least = arguments.get("global_entropy_min_experts", experts)
    if not (isinstance(least, int) and 1 <= least <= experts):
        raise MoEError(f"global_entropy_min_experts is {least!r}; it must be between 1 and num_experts = {experts}.")
    if "device_balance_loss" in coefficients:
        groups = arguments.get("num_device_groups")
        if not (isinstance(groups, int) and groups >= 1 and experts % groups == 0):
            raise MoEError(
                f"device_balance_loss: num_device_groups in router_loss_kwargs is {groups!r}; it must divide "
                f"num_experts = {experts}."
            )
    for name in ("sparsity_loss", "gate_variance_loss"):
        if name in coefficients and config.scoring_func != "sigmoid":
            raise MoEError(f"{name} is about gates that open independently: it needs scoring_func='sigmoid'.")
    if "policy_gradient_loss" in coefficients:
        _check_policy(config)
    if "load_loss" not in coefficients:
        return
    if config.router_noise not in ("gaussian", "learned") or config.router_noise_scale == 0:
        raise MoEError("load_loss is about gaussian noise: set router_noise to 'gaussian' or 'learned'.")
    if config.router_type == "top_p" or config.balance_strategy == "bias" or config.n_group is not None:
        raise MoEError(
            "load_loss takes the chance to be among the K highest logits for the chance to be chosen: it goes with "
            "neither router_type='top_p', nor balance_strategy='bias', nor n_group."
        )


def _check_policy(config: Any) -> None:
    draws_order = (
        config.router_type == "top_k"
        and config.router_noise == "gumbel"
        and config.router_noise_scale > 0
        and config.balance_strategy != "bias"
        and config.n_group is None
    )
    if not draws_order and config.router_type != "bernoulli":
        raise MoEError(
            "policy_gradient_loss needs the probability of a drawn choice: use router_type='bernoulli', or 'top_k' with "
            "router_noise='gumbel' and neither balance_strategy='bias' nor n_group."
        )


def check_structure(config: Any) -> None:
    """Which layers have experts, and what such a layer consists of."""
    if config.moe_intermediate_size is not None and config.moe_intermediate_size < 1:
        raise MoEError(f"moe_intermediate_size is {config.moe_intermediate_size}; it must be at least 1, or None.")
    for name, least in (
        ("num_moe_heads", 1),
        ("shared_expert_intermediate_size", 0),
        ("first_k_dense_replace", 0),
        ("decoder_sparse_step", 1),
    ):
        if getattr(config, name) < least:
            raise MoEError(f"{name} is {getattr(config, name)}; it must be at least {least}.")
    for name in ("is_encoder_decoder", "chunk_size_feed_forward"):
        if getattr(config, name):
            raise MoEError(f"{name} is {getattr(config, name)}, and no decoder of a MoE reads it: leave it out.")
    layers = getattr(config.text_config, "num_hidden_layers", None)
    if layers is None:
        raise MoEError(
            f"text_config is a {type(config.text_config).__name__}, which has no decoder layers of its own (a model "
            "of several parts?); give the config of its text decoder."
        )
    outside = [i for i in config.mlp_only_layers if not 0 <= i < layers]
    if outside:
        raise MoEError(f"mlp_only_layers names layers {outside}; the model has layers 0 to {layers - 1}.")
    _check_parts(config, layers)
    if not any(config.is_moe_layer(i) for i in range(layers)):
        raise MoEError(
            f"first_k_dense_replace={config.first_k_dense_replace}, decoder_sparse_step={config.decoder_sparse_step} "
            f"and mlp_only_layers={config.mlp_only_layers} leave none of the {layers} layers with experts."
        )


def _check_parts(config: Any, num_layers: int) -> None:
    """What a MoE layer consists of: experts per layer, their widths, extra experts, the gate of the shared expert."""
    if config.shared_expert_gate not in (False, True, "softmax"):
        raise MoEError(f"shared_expert_gate is {config.shared_expert_gate!r}; it must be a bool, or 'softmax'.")
    if config.shared_expert_gate and config.shared_expert_intermediate_size == 0:
        raise MoEError(
            f"shared_expert_gate={config.shared_expert_gate!r} needs a shared expert: set shared_expert_intermediate_size."
        )
    _check_member(config, "moe_dense_ffn", DENSE_FFN_PLACES)
    _check_experts_per_layer(config, num_layers)
    _check_output_mixture(config, num_layers)
    widths = config.expert_intermediate_sizes
    if widths is not None and (len(widths) != config.num_experts or min(widths) < 1):
        raise MoEError(
            f"expert_intermediate_sizes is {widths}; it must have a width of at least 1 for each of num_experts = "
            f"{config.num_experts} experts."
        )
    if widths is not None and config.moe_intermediate_size != max(widths):
        raise MoEError(
            f"moe_intermediate_size is {config.moe_intermediate_size} and the widest of expert_intermediate_sizes is "
            f"{max(widths)}: leave moe_intermediate_size out."
        )
    for name, fields in _EXCLUDED_WITH.items():
        for field, is_set in fields.items():
            if getattr(config, name) and is_set(config):
                raise MoEError(f"{name} does not go together with {field}: leave one of them out.")


def _check_output_mixture(config: Any, num_layers: int) -> None:
    """Where experts can predict one by one."""
    if config.output_mixture is None:
        return
    if config.output_mixture != "likelihood":
        raise MoEError(f"output_mixture is {config.output_mixture!r}; it must be None or 'likelihood'.")
    if not config.is_moe_layer(num_layers - 1):
        raise MoEError("output_mixture='likelihood' is about the experts of the last layer, and that one has none.")
    if config.num_moe_heads > 1 or config.routed_scaling_factor != 1:
        raise MoEError(
            "output_mixture='likelihood' weighs the predictions of whole experts by probabilities: leave num_moe_heads and "
            "routed_scaling_factor out."
        )


def _check_experts_per_layer(config: Any, num_layers: int) -> None:
    counts = config.num_experts_per_layer
    if counts is None:
        return
    if len(counts) != num_layers or min(counts) < 0 or max(counts) != config.num_experts:
        raise MoEError(
            f"num_experts_per_layer is {counts}; it must have an entry of at least 0 for each of the {num_layers} decoder "
            f"layers, and its largest must be num_experts, which is {config.num_experts}."
        )
    for layer, count in enumerate(counts):
        if 0 < count < config.num_experts_per_tok:
            raise MoEError(
                f"num_experts_per_layer gives layer {layer} {count} experts, fewer than num_experts_per_tok = "
                f"{config.num_experts_per_tok}."
            )
        if count > 0 and not config.is_moe_layer(layer):
            raise MoEError(
                f"num_experts_per_layer gives layer {layer} {count} experts, and first_k_dense_replace, "
                "decoder_sparse_step or mlp_only_layers keep it dense: give it 0."
            )


def _names_experts(config: Any) -> bool:
    return bool(config.expert_groups) or config.n_group is not None or "num_device_groups" in config.router_loss_kwargs


# What cannot be combined: a field, and other fields with whether they are set.
_EXCLUDED_WITH: dict[str, dict[str, Callable[[Any], bool]]] = {
    "num_experts_per_layer": {
        "expert_groups, n_group or num_device_groups, which name experts": _names_experts,
        "expert_intermediate_sizes": lambda config: config.expert_intermediate_sizes is not None,
    },
    "extra_experts": {
        "expert_groups, n_group or num_device_groups, which name experts": _names_experts,
        "num_moe_heads": lambda config: config.num_moe_heads > 1,
        "capacity_factor or eval_capacity_factor": lambda config: (
            config.capacity_factor is not None or config.eval_capacity_factor is not None
        ),
    },
}


def beyond_plain_blocks(config: Any) -> list[str]:
    """The fields, as `name=value`, that make a block more than E equal experts behind a linear router of tokens."""
    plain = {"router_arch": "linear", "routing_level": "token", "num_moe_heads": 1, "router_type": "top_k"}
    plain |= {"router_per_task": False, "expert_groups": None, "num_experts_per_layer": None}
    plain |= {"expert_intermediate_sizes": None, "extra_experts": None, "moe_dense_ffn": None, "output_mixture": None}
    named = {name: getattr(config, name) for name in plain}
    fields = [f"{name}={value!r}" for name, value in named.items() if (value or None) != (plain[name] or None)]
    return fields + ["shared_expert_gate='softmax'"] * (config.shared_expert_gate == "softmax")
