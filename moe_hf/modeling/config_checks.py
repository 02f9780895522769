"""What the routing fields of a configuration may be, alone and together.

Letters: E experts, K experts per token.
"""

import math
from typing import Any


SCORING_FUNCTIONS = ("softmax", "sigmoid")
ROUTER_NOISES = ("none", "gaussian", "uniform", "gumbel", "learned")
NOISE_AFFECTS = ("selection", "both")
OVERFLOW_POLICIES = ("drop", "reroute")
CAPACITY_ORDERS = ("token_major", "choice_major")
BALANCE_STRATEGIES = ("loss", "bias")
BALANCE_LOSS_SCOPES = ("micro_batch", "sequence", "global_batch")
LOAD_ESTIMATORS = ("shazeer", "vmoe")
# The losses that `router_loss_coefs` may name, and the keys of `router_loss_kwargs` that each reads.
FURTHER_LOSSES: dict[str, tuple[str, ...]] = {
    "importance_loss": ("load_estimator",),
    "load_loss": ("load_estimator",),
    "local_entropy_loss": (),
    "global_entropy_loss": ("global_entropy_min_experts",),
    "device_balance_loss": ("num_device_groups",),
}


class MoEError(ValueError):
    """A user's mistake: says what was given, what is allowed, and what to do."""


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
            "capacity_order='choice_major' lets a later token's first choice take the slot of an earlier token's "
            "second one. Use 'token_major', or set allow_noncausal_routing=True."
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
    if "load_loss" not in coefficients:
        return
    if config.router_noise not in ("gaussian", "learned") or config.router_noise_scale == 0:
        raise MoEError("load_loss is about gaussian noise: set router_noise to 'gaussian' or 'learned'.")
    if config.router_type == "top_p" or config.balance_strategy == "bias" or config.n_group is not None:
        raise MoEError(
            "load_loss takes the chance to be among the K highest logits for the chance to be chosen: it goes with "
            "neither router_type='top_p', nor balance_strategy='bias', nor n_group."
        )
