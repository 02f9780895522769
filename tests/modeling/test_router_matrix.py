"""Every router with every option, two by two: it holds the laws of a causal model, or it is refused in one sentence."""

import pytest
import torch

from examples import convolution_expert, load_aware_router  # noqa: F401 - importing registers them
from moe_hf import MoEConfig, MoEError, MoEForCausalLM
from moe_hf.modeling.routers import ROUTERS, check_generation, why_no_cache
from tests.modeling.router_inputs import given_ids
from tests.modeling.router_properties import set_bias
from tests.sampling import sampled
from tests.tiny_models import random_ids, randomise_, tiny_config


EVERY = {"num_experts_per_tok": 8, "router_aux_loss_coef": 0.0}
ROUTER_FIELDS = {
    "top_k": {},
    "stochastic_top_k": {},
    "top_p": {},
    "segment_merge": {**EVERY, "router_kwargs": {"segment_length": 3}},
    "expert_choice": {"allow_noncausal_routing": True},
    "expert_threshold": {},
    "load_aware": {},
    "dense": EVERY,
    "dense_margin": EVERY,
    "bernoulli": {"scoring_func": "sigmoid"},
}
OPTIONS = {
    "sigmoid": {"scoring_func": "sigmoid"},
    "scaled": {"routed_scaling_factor": 2.5},
    "groups": {"n_group": 4, "topk_group": 2},
    "bias": {"balance_strategy": "bias"},
    "mlp": {"router_arch": "mlp"},
    "cosine": {"router_arch": "cosine"},
    "attention": {"router_arch": "attention"},
    "multi_head": {"num_moe_heads": 3},
    "task": {"routing_level": "task", "num_tasks": 3},
    "prefix": {"routing_level": "prefix"},
    "sequence": {"routing_level": "sequence", "allow_noncausal_routing": True},
    "router_per_task": {"router_per_task": True, "num_tasks": 3},
    "expert_groups": {"expert_groups": {"language": [[0, 1, 2, 3], [3, 4, 5, 6, 7]]}},
    "prior": {"expert_groups": {"language": [[0, 1, 2, 3], [4, 5, 6, 7]]}, "expert_group_prior": 0.7},
    "jitter": {"router_jitter_noise": 0.3},
    "gaussian": {"router_noise": "gaussian"},
    "learned": {"router_noise": "learned", "router_noise_affects": "both"},
    "capacity": {"capacity_factor": 0.6, "min_expert_capacity": 1},
    "reroute": {"capacity_factor": 0.6, "min_expert_capacity": 1, "overflow_policy": "reroute"},
    "eval_capacity": {"eval_capacity_factor": 0.6, "min_expert_capacity": 1},
    "pyramid": {"num_experts_per_layer": [4, 6, 8]},
    "widths": {"expert_intermediate_sizes": [88, 40, 64, 24, 88, 16, 8, 48]},
    "extra": {"extra_experts": ["zero", "copy", "constant"]},
    "convolution": {"extra_experts": ["causal_convolution"]},
    "shared": {"shared_expert_intermediate_size": 88, "shared_expert_gate": "softmax"},
    "dense_before": {"moe_dense_ffn": "before"},
    "dense_after": {"moe_dense_ffn": "after"},
    "likelihood": {"output_mixture": "likelihood"},
    "losses": {"router_loss_coefs": {"importance_loss": 0.1, "local_entropy_loss": 0.1, "global_entropy_loss": 0.1}},
    "sequence_balance": {"balance_loss_scope": "sequence", "router_aux_loss_coef": 0.01},
}

# What each router refuses, by names of OPTIONS.
REFUSED = {
    "top_k": "likelihood",
    "stochastic_top_k": "groups bias expert_groups reroute likelihood",
    "top_p": "sigmoid groups bias expert_groups capacity reroute eval_capacity likelihood",
    "segment_merge": "sigmoid scaled groups bias multi_head expert_groups gaussian learned capacity reroute eval_capacity pyramid widths extra convolution likelihood sequence_balance",
    "expert_choice": "groups bias expert_groups gaussian learned capacity reroute eval_capacity pyramid widths extra convolution likelihood",
    "expert_threshold": "sigmoid groups bias expert_groups gaussian learned capacity reroute eval_capacity pyramid widths extra convolution likelihood",
    "load_aware": "groups bias expert_groups gaussian learned capacity reroute eval_capacity pyramid widths extra convolution likelihood",
    "dense": "sigmoid groups bias expert_groups gaussian learned capacity reroute eval_capacity pyramid widths extra convolution",
    "dense_margin": "sigmoid groups bias expert_groups gaussian learned capacity reroute eval_capacity pyramid widths extra convolution likelihood",
    "bernoulli": "groups bias expert_groups gaussian learned capacity reroute eval_capacity pyramid widths extra convolution likelihood",
}


def fields_of(router: str, option: str) -> dict:
    return {"num_experts": 8, "router_type": router, **ROUTER_FIELDS[router], **OPTIONS[option]}


def build(router: str, option: str) -> MoEForCausalLM | None:
    """The model, or None where the pair is refused."""
    try:
        model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), **fields_of(router, option)))
    except MoEError:
        return None
    randomise_(model)
    return set_bias(model)


def test_every_router_is_in_the_matrix():
    assert set(ROUTER_FIELDS) == set(ROUTERS)


@torch.no_grad()
def check_evaluation(model: MoEForCausalLM, ids: torch.Tensor, is_causal: bool) -> None:
    """Later tokens and other rows change nothing; decoding with a cache equals a full forward pass, or is refused."""
    given = given_ids(model.config, ids)
    full = model.eval()(ids, use_cache=False, **given).logits
    changed = ids.clone()
    changed[:, 6:] = (changed[:, 6:] + 5) % 110
    now = model(changed, use_cache=False, **given).logits
    same = torch.allclose(now[:, :6], full[:, :6], atol=1e-4)
    # By the task alone all tokens of a row score the same, whatever stands there.
    assert same == is_causal or model.config.routing_level == "task"
    one = {name: value[1:2] for name, value in given.items()}
    assert torch.allclose(model(ids[1:2], use_cache=False, **one).logits, full[1:2], atol=1e-4)
    if not is_causal:
        with pytest.raises(MoEError, match="cannot generate"):
            model.generate(ids, max_new_tokens=1, **given)
        return
    first = model(ids[:, :6], use_cache=True, **{name: value[:, :6] for name, value in given.items()})
    rest = {name: value[:, 6:] for name, value in given.items()}
    if why_no_cache(model.config) is not None:
        with pytest.raises(MoEError, match="use_cache=False"):
            model(ids[:, 6:], past_key_values=first.past_key_values, **rest)
        return
    cached = model(ids[:, 6:], past_key_values=first.past_key_values, **rest).logits
    assert torch.allclose(cached, full[:, 6:], atol=1e-4)


@pytest.mark.parametrize(("router", "option"), sampled(ROUTER_FIELDS.keys(), OPTIONS.keys()))
def test_a_router_with_an_option_is_a_causal_model_or_is_refused(router, option):
    model, ids = build(router, option), random_ids(2, 10)
    assert (model is None) == (option in REFUSED[router].split())
    if model is None:
        return
    try:
        check_generation(model.config)
        is_causal = True
    except MoEError:
        is_causal = False
    assert is_causal or router == "expert_choice" or option == "sequence"
    check_evaluation(model, ids, is_causal)
    output = model.train()(ids, labels=ids, **given_ids(model.config, ids))
    output.loss.backward()
    assert torch.isfinite(output.loss)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
