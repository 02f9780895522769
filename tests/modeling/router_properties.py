"""Every router with every option, one row each: how it is configured, what it declares, and its naive reference.

A router joins `test_router_properties.py` by one row of `CASES`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from examples import convolution_expert, load_aware_router  # noqa: F401 - importing registers them
from moe_hf import MoEConfig, MoEForCausalLM
from moe_hf.modeling.experts import Experts
from moe_hf.modeling.router import Router
from tests.modeling.router_references import (
    BIAS,
    Choices,
    choice_major,
    dense,
    expert_choice,
    expert_threshold,
    load_aware,
    open_gates,
    prioritized,
    segments,
    threshold,
    top_k,
    top_p,
)
from tests.tiny_models import randomise_, tiny_config


NUM_EXPERTS = 8


def one(total: torch.Tensor, config: MoEConfig) -> bool:
    """The weights of a token sum to `routed_scaling_factor`."""
    return torch.allclose(total, torch.full_like(total, config.routed_scaling_factor), atol=1e-5)


def at_most_one(total: torch.Tensor, config: MoEConfig) -> bool:
    """The weights of a token sum to less than 1 for some token, and to more for none."""
    return bool((total <= 1 + 1e-5).all() and (total < 0.999).any() and (total >= 0).all())


def whole(total: torch.Tensor, config: MoEConfig) -> bool:
    """The weights of a token are ones, not equally many for all tokens."""
    return bool(((total - total.round()).abs() < 1e-5).all() and total.max() > total.min())


def one_or_none(total: torch.Tensor, config: MoEConfig) -> bool:
    """The weights of a token sum to 1, or, when all of its choices were dropped, to 0."""
    return bool(((total - 1).abs() < 1e-5).logical_or(total == 0).all())


@dataclass(frozen=True)
class RouterCase:
    """One router with one set of options.

    Attributes:
        fields: fields of `MoEConfig`.
        reference: naive choices and weights from float64 scores; in training mode, unless it draws there.
        draws: whether training draws random numbers; evaluation never does.
        counts_tokens: whether, in training, a token's experts depend on how many tokens its sequence has.
        leaks_in_training: whether, in training, later tokens change earlier ones; then `allow_noncausal_routing` is set.
        leaks_always: whether they do in evaluation too, so that generating is refused.
        learns_from_reward: whether the router has a gradient from the rewards of predictions alone.
        refuses_cache: whether decoding with a cache is refused.
        weights_sum: what the weights of a token sum to, in training.
        compiles: whether the model compiles as one graph; otherwise it goes in rounds, or in parts, whose number depends on
            the tokens.
        merges: whether experts' weights are mixed, and not their outputs.
        upcycles_exactly: whether copies of a dense MLP give the dense model, in evaluation.
    """

    fields: dict[str, Any]
    reference: Callable[[torch.Tensor, list[list[int]], MoEConfig], Choices]
    draws: bool = False
    counts_tokens: bool = False
    leaks_in_training: bool = False
    leaks_always: bool = False
    learns_from_reward: bool = False
    refuses_cache: bool = False
    weights_sum: Callable[[torch.Tensor, MoEConfig], bool] = one
    compiles: bool = True
    merges: bool = False
    upcycles_exactly: bool = True

    def config(self, layers: int = 3) -> MoEConfig:
        """The configuration of a tiny llama with this router."""
        fields = {"num_experts": NUM_EXPERTS, **self.fields}
        if "num_experts_per_layer" in fields:
            fields["num_experts_per_layer"] = fields["num_experts_per_layer"][-layers:]
        return MoEConfig(text_config=tiny_config("llama", num_hidden_layers=layers), **fields)

    def model(self, layers: int = 3) -> MoEForCausalLM:
        """A tiny model with random weights, router parameters included."""
        model = MoEForCausalLM(self.config(layers))
        randomise_(model)
        return set_bias(model)


def set_bias(model: nn.Module) -> nn.Module:
    """Give the routers in `model` `BIAS` for the correction bias and for the state that they keep, where they have them.

    Experts get back the zeros that narrower ones are padded with.
    """
    for router in model.modules():
        if isinstance(router, Experts):
            router.zero_padding_()
        if isinstance(router, Router) and router.e_score_correction_bias is not None:
            router.e_score_correction_bias.copy_(BIAS)
        for name in router.state_names if isinstance(router, Router) else ():
            getattr(router, name).copy_(BIAS)
    return model


TIGHT = {"capacity_factor": 0.6, "min_expert_capacity": 1}
GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
LANGUAGES = {"language": [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]}
MODALITIES = {"modality": [[1, 3, 4, 5, 7], [0, 1, 2, 3, 4, 5, 6, 7], [0, 2, 3, 4, 6]]}
STOCHASTIC = {"router_type": "stochastic_top_k"}
NONCAUSAL = {"allow_noncausal_routing": True}
GATES = {"router_type": "bernoulli", "scoring_func": "sigmoid"}
EVERY = {"num_experts_per_tok": NUM_EXPERTS, "router_aux_loss_coef": 0.0}

CASES: dict[str, RouterCase] = {
    "top_k": RouterCase({}, top_k),
    "switch": RouterCase({"num_experts_per_tok": 1}, top_k, weights_sum=at_most_one, upcycles_exactly=False),
    "unnormalised": RouterCase(
        {"norm_topk_prob": False, "num_experts_per_tok": 3}, top_k, weights_sum=at_most_one, upcycles_exactly=False
    ),
    "sigmoid": RouterCase({"scoring_func": "sigmoid", "routed_scaling_factor": 2.5}, top_k),
    "groups_sigmoid": RouterCase({"scoring_func": "sigmoid", **GROUPS}, top_k),
    "groups_softmax": RouterCase(GROUPS, top_k),
    "bias": RouterCase({"balance_strategy": "bias"}, top_k),
    "mlp": RouterCase({"router_arch": "mlp"}, top_k),
    "cosine": RouterCase(
        {"router_arch": "cosine", "router_arch_kwargs": {"hidden_size": 5, "temperature": 0.1}}, top_k
    ),
    "attention": RouterCase({"router_arch": "attention"}, top_k),
    "multi_head": RouterCase({"num_moe_heads": 3}, top_k, upcycles_exactly=False),
    "multi_head_capacity": RouterCase(
        {"num_moe_heads": 2, "router_arch": "cosine", "capacity_factor": 0.6, "min_expert_capacity": 1},
        top_k,
        counts_tokens=True,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
    "deepseek_v3": RouterCase(
        {"scoring_func": "sigmoid", "balance_strategy": "bias", "routed_scaling_factor": 2.5, **GROUPS}, top_k
    ),
    "task": RouterCase({"routing_level": "task", "num_tasks": 3}, top_k),
    "task_top_p": RouterCase(
        {"routing_level": "task", "num_tasks": 3, "router_type": "top_p"},
        top_p,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
    "router_per_task": RouterCase({"num_tasks": 3, "router_per_task": True}, top_k),
    "expert_groups": RouterCase({"expert_groups": LANGUAGES | MODALITIES}, top_k),
    "expert_groups_sigmoid_capacity": RouterCase(
        TIGHT | {"expert_groups": LANGUAGES, "scoring_func": "sigmoid", "overflow_policy": "reroute"},
        top_k,
        counts_tokens=True,
        weights_sum=one_or_none,
        compiles=False,
    ),
    "expert_group_prior": RouterCase({"expert_groups": LANGUAGES, "expert_group_prior": 0.7}, top_k),
    "prefix": RouterCase({"routing_level": "prefix"}, top_k),
    "jitter": RouterCase({"router_jitter_noise": 0.3}, top_k, draws=True),
    "gaussian": RouterCase({"router_noise": "gaussian", "router_noise_scale": 8.0}, top_k, draws=True),
    "uniform": RouterCase({"router_noise": "uniform"}, top_k, draws=True),
    "gumbel": RouterCase({"router_noise": "gumbel"}, top_k, draws=True),
    "shazeer": RouterCase({"router_noise": "learned", "router_noise_affects": "both"}, top_k, draws=True),
    "drop": RouterCase(TIGHT, top_k, counts_tokens=True, weights_sum=at_most_one),
    "drop_after": RouterCase(
        TIGHT | {"router_kwargs": {"renormalise": "after"}}, top_k, counts_tokens=True, weights_sum=one_or_none
    ),
    "drop_three": RouterCase(TIGHT | {"num_experts_per_tok": 3}, top_k, counts_tokens=True, weights_sum=at_most_one),
    "drop_fixed_capacity": RouterCase(
        {"capacity_factor": 0.01, "min_expert_capacity": 3}, top_k, weights_sum=at_most_one
    ),
    "drop_groups": RouterCase(TIGHT | GROUPS, top_k, counts_tokens=True, weights_sum=at_most_one),
    "reroute": RouterCase(
        TIGHT | {"overflow_policy": "reroute", "capacity_factor": 1.1}, top_k, counts_tokens=True, compiles=False
    ),
    "reroute_scarce": RouterCase(
        TIGHT | {"overflow_policy": "reroute"}, top_k, counts_tokens=True, weights_sum=one_or_none, compiles=False
    ),
    "reroute_groups": RouterCase(
        TIGHT | GROUPS | {"overflow_policy": "reroute"},
        top_k,
        counts_tokens=True,
        weights_sum=one_or_none,
        compiles=False,
    ),
    "choice_major": RouterCase(
        TIGHT | {"capacity_order": "choice_major", "allow_noncausal_routing": True},
        choice_major,
        counts_tokens=True,
        leaks_in_training=True,
        weights_sum=at_most_one,
    ),
    "eval_capacity": RouterCase(
        TIGHT | {"eval_capacity_factor": 0.6},
        top_k,
        counts_tokens=True,
        refuses_cache=True,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
    "gshard": RouterCase(
        {**STOCHASTIC, "router_kwargs": {"policy": "random", "threshold": 0.5}},
        top_k,
        draws=True,
        weights_sum=at_most_one,
    ),
    "st_moe": RouterCase({**STOCHASTIC, "num_experts_per_tok": 3}, top_k, draws=True, weights_sum=at_most_one),
    "threshold": RouterCase(
        {**STOCHASTIC, "num_experts_per_tok": 3, "router_kwargs": {"policy": "threshold", "threshold": 0.3}},
        threshold,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
    "threshold_after": RouterCase(
        {**STOCHASTIC, "router_kwargs": {"policy": "threshold", "threshold": 0.25, "renormalise": "after"}}, threshold
    ),
    "sampling": RouterCase({**STOCHASTIC, "router_kwargs": {"policy": "sampling"}}, top_k, draws=True),
    "gshard_capacity": RouterCase(
        TIGHT | STOCHASTIC | {"router_kwargs": {"threshold": 0.5}},
        top_k,
        draws=True,
        counts_tokens=True,
        weights_sum=at_most_one,
    ),
    "segment_merge": RouterCase(
        {
            "router_type": "segment_merge",
            "num_experts_per_tok": NUM_EXPERTS,
            "router_aux_loss_coef": 0.0,
            "router_kwargs": {"segment_length": 3},
        },
        segments,
        merges=True,
        compiles=False,
    ),
    "top_p": RouterCase({"router_type": "top_p"}, top_p, weights_sum=at_most_one, upcycles_exactly=False),
    "top_p_limits": RouterCase(
        {"router_type": "top_p", "router_kwargs": {"top_p": 0.7, "min_experts": 2, "max_experts": 3}},
        top_p,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
    "top_p_normalised": RouterCase({"router_type": "top_p", "norm_topk_prob": True}, top_p),
    "top_p_gumbel": RouterCase(
        {"router_type": "top_p", "router_noise": "gumbel"},
        top_p,
        draws=True,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
    "batch_prioritized": RouterCase(
        TIGHT | NONCAUSAL | {"capacity_order": "batch_prioritized"},
        prioritized,
        counts_tokens=True,
        leaks_in_training=True,
        weights_sum=at_most_one,
    ),
    "expert_choice": RouterCase(
        {"router_type": "expert_choice", **NONCAUSAL},
        expert_choice,
        counts_tokens=True,
        leaks_always=True,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
    "expert_threshold": RouterCase(
        {"router_type": "expert_threshold"}, expert_threshold, weights_sum=at_most_one, upcycles_exactly=False
    ),
    "load_aware": RouterCase({"router_type": "load_aware", "router_kwargs": {"strength": 0.5}}, load_aware),
    "dense": RouterCase({"router_type": "dense", **EVERY}, dense),
    "likelihood": RouterCase({"router_type": "dense", "output_mixture": "likelihood", **EVERY}, dense),
    "dense_margin": RouterCase({"router_type": "dense_margin", **EVERY, "router_kwargs": {"margin": 0.15}}, dense),
    "bernoulli": RouterCase(GATES, open_gates, draws=True, weights_sum=whole, upcycles_exactly=False),
    "bernoulli_reinforce": RouterCase(
        {
            **GATES,
            "router_loss_coefs": {"policy_gradient_loss": 0.1, "sparsity_loss": 0.1, "gate_variance_loss": 0.1},
            "router_kwargs": {"estimator": "reinforce"},
        },
        open_gates,
        draws=True,
        learns_from_reward=True,
        weights_sum=whole,
        upcycles_exactly=False,
    ),
    "policy": RouterCase(
        {
            "router_noise": "gumbel",
            "router_loss_coefs": {"policy_gradient_loss": 0.1},
            "router_kwargs": {"weight_gradient": False},
        },
        top_k,
        draws=True,
        learns_from_reward=True,
    ),
    "pyramid": RouterCase({"num_experts_per_layer": [4, 6, 8]}, top_k),
    "widths": RouterCase(
        {"expert_intermediate_sizes": [88, 40, 64, 24, 88, 16, 8, 48]}, top_k, upcycles_exactly=False
    ),
    "shared_sigmoid": RouterCase({"shared_expert_intermediate_size": 88, "shared_expert_gate": True}, top_k),
    "residual_softmax": RouterCase({"shared_expert_intermediate_size": 88, "shared_expert_gate": "softmax"}, top_k),
    "dense_before": RouterCase({"moe_dense_ffn": "before"}, top_k),
    "dense_after_pyramid_residual": RouterCase(
        {
            "moe_dense_ffn": "after",
            "num_experts_per_layer": [4, 6, 8],
            "shared_expert_intermediate_size": 88,
            "shared_expert_gate": "softmax",
        },
        top_k,
    ),
    "extra_experts": RouterCase(
        {"extra_experts": ["constant", "zero", "copy", "constant"], "num_experts_per_tok": 3},
        top_k,
        upcycles_exactly=False,
    ),
    "extra_experts_top_p": RouterCase(
        {"router_type": "top_p", "extra_experts": ["copy", "zero", "constant"]},
        top_p,
        weights_sum=at_most_one,
        upcycles_exactly=False,
    ),
    "convolution": RouterCase(
        {"extra_experts": ["copy", "causal_convolution"], "num_experts": 4, "num_experts_per_tok": 3},
        top_k,
        refuses_cache=True,
        upcycles_exactly=False,
    ),
}
