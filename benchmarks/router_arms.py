"""The routers that the study compares, one row each, and the models that they start as.

Letters: D model width, F width of the dense MLP, E experts, K experts per token.
"""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

import moe_hf
from benchmarks.study import MOE, Settings
from moe_hf.modeling.multi_head import parity_experts, parity_width
from moe_hf.upcycling.initialisers import make_initialiser


REFERENCE = "top_k"
NO_BALANCE = {"router_aux_loss_coef": 0.0}
NONCAUSAL = {"allow_noncausal_routing": True}
STOCHASTIC = {"router_type": "stochastic_top_k"}
FULL = {"capacity_factor": 1.0}


@dataclass(frozen=True)
class Arm:
    """One router, and how a dense model gets it.

    Attributes:
        title: its name in tables and pictures.
        fields: fields of `MoEConfig` beside the 8 experts and 2 per token of all; None for the dense model itself.
        init: an initialiser's name; its experts are those of the reference where it is `"copy"`.
        options: of the initialiser.
        added: fields that upcycling has no use for: a model that has them takes over what the upcycled one without them
            has.
        new_experts: whether experts and routers are random, and only the rest is the dense model's.
        reads_task: whether it needs the domain of a text.
        changes: what it changes against the reference: `"choice"`, other experts for the same hidden states;
            `"experts"`, other experts to choose from; `"nothing"`, a control.
    """

    title: str
    fields: dict[str, Any] | None = field(default_factory=dict)
    init: str = "copy"
    options: dict[str, Any] = field(default_factory=dict)
    added: tuple[str, ...] = ()
    new_experts: bool = False
    reads_task: bool = False
    changes: str = "choice"

    @property
    def is_causal(self) -> bool:
        """Whether its loss as a language model means something."""
        return not (self.fields or {}).get("allow_noncausal_routing", False)

    @property
    def config_fields(self) -> dict[str, Any]:
        """All fields that differ from the defaults of `MoEConfig`."""
        return MOE | (self.fields or {})


def router_arms(settings: Settings) -> dict[str, Arm]:
    """Every router by name, at sizes of equal active arithmetic for a dense parent of `settings` where that can be."""
    return {
        "dense_model": Arm("dense model, trained on", None, changes="nothing"),
        REFERENCE: Arm("plain top-k, K = 2", changes="nothing"),
        **_token_choice(settings),
        **_balance_and_capacity(),
        **_architectures(settings),
        **_deciders(),
        **_soft_and_expert_choice(settings),
    }


def _token_choice(settings: Settings) -> dict[str, Arm]:
    width, load = settings.intermediate_size, {"importance_loss": 0.01, "load_loss": 0.01}
    drawn = {"router_noise": "learned", "router_noise_affects": "both", "router_loss_coefs": load}
    wide = {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 2 * width}
    entropy = {"local_entropy_loss": 1e-4}
    return {
        "switch": Arm("Switch, K = 1, 4 experts of 2 F", wide, added=("moe_intermediate_size",), changes="experts"),
        "switch_narrow": Arm("Switch, K = 1", {"num_experts_per_tok": 1}),
        "gshard": Arm("GShard, random second", STOCHASTIC | {"router_kwargs": {"policy": "random", "threshold": 0.5}}),
        "st_moe": Arm("ST-MoE, random 0.2", STOCHASTIC | {"router_kwargs": {"policy": "random", "threshold": 0.2}}),
        "threshold": Arm("threshold 0.3", STOCHASTIC | {"router_kwargs": {"policy": "threshold", "threshold": 0.3}}),
        "sampling": Arm("sampled second", STOCHASTIC | {"router_kwargs": {"policy": "sampling"}}),
        "top_p": Arm(
            "top-p 0.46, entropy loss",
            {"router_type": "top_p", "router_kwargs": {"top_p": 0.46}, "router_loss_coefs": entropy},
        ),
        "noisy_top_k": Arm("noisy top-k (Shazeer)", drawn | NO_BALANCE),
        "gaussian": Arm("gaussian noise 1 / E", {"router_noise": "gaussian", "router_noise_affects": "both"}),
        "uniform": Arm("uniform noise", {"router_noise": "uniform"}),
        "gumbel": Arm("gumbel noise", {"router_noise": "gumbel"}),
        "jitter": Arm("jitter 0.01", {"router_jitter_noise": 0.01}),
        "policy_gradient": Arm(
            "policy gradient",
            {
                "router_noise": "gumbel",
                "router_kwargs": {"weight_gradient": False},
                "router_loss_coefs": {"policy_gradient_loss": 0.1},
            },
        ),
    }


def _balance_and_capacity() -> dict[str, Arm]:
    groups = {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2, "balance_strategy": "bias"}
    return {
        "sigmoid": Arm("sigmoid scores", {"scoring_func": "sigmoid"}),
        "deepseek_v3": Arm("sigmoid, groups, bias", groups | {"bias_update_rate": 3e-3}),
        "deepseek_v3_held": Arm("sigmoid, groups, bias held at 0", groups | {"bias_update_rate": 0.0}),
        "drop": Arm("capacity 1, drop", FULL),
        "reroute": Arm("capacity 1, reroute", FULL | {"overflow_policy": "reroute"}),
        "choice_major": Arm("capacity 1, first choices first", FULL | NONCAUSAL | {"capacity_order": "choice_major"}),
        "batch_prioritized": Arm(
            "capacity 1, batch priority", FULL | NONCAUSAL | {"capacity_order": "batch_prioritized"}
        ),
    }


def _architectures(settings: Settings) -> dict[str, Arm]:
    size, width, layers = settings.hidden_size, settings.intermediate_size, settings.num_hidden_layers
    head_width = parity_width(size, width, 2, multi_head_experts=2)
    heads = {"num_moe_heads": 2, "moe_intermediate_size": head_width}
    heads["num_experts"] = parity_experts(size, width, MOE["num_experts"], 2, head_width)
    pyramid = [4 if layer < (layers + 1) // 2 and layers > 1 else 8 for layer in range(layers)]
    residual = {"num_experts_per_tok": 1, "shared_expert_gate": "softmax"}
    return {
        "mlp": Arm("MLP router", {"router_arch": "mlp"}),
        "cosine": Arm("cosine router", {"router_arch": "cosine"}),
        "attention": Arm("attention router", {"router_arch": "attention"}),
        "deepseek_moe": Arm(
            "shared F, and 2 of 16 of F / 2",
            {"num_experts": 16, "shared_expert_intermediate_size": width},
            "granular",
            {"shards": 2},
            changes="experts",
        ),
        "pr_moe": Arm(
            "PR-MoE: residual, K = 1, fewer below",
            residual | {"shared_expert_intermediate_size": width, "num_experts_per_layer": pyramid},
        ),
        "dense_ffn": Arm("ST-MoE's dense layer before, K = 1", {"moe_dense_ffn": "before", "num_experts_per_tok": 1}),
        "extra_experts": Arm(
            "zero, copy, 2 constant experts beside",
            {"extra_experts": ["zero", "copy", "constant", "constant"]},
            added=("extra_experts",),
        ),
        "new_experts": Arm("plain top-k, new experts", new_experts=True, changes="nothing"),
        "multi_head": Arm("multi-head, new experts", heads, new_experts=True, changes="experts"),
    }


def _deciders() -> dict[str, Arm]:
    groups = {"expert_groups": {"task": [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7]]}}
    return {
        "prefix": Arm("prefix level", {"routing_level": "prefix"}),
        "sequence": Arm("sequence level", {"routing_level": "sequence"} | NONCAUSAL),
        "task": Arm("task level", {"routing_level": "task", "num_tasks": 2}, reads_task=True),
        "router_per_task": Arm("a router per task", {"router_per_task": True, "num_tasks": 2}, reads_task=True),
        "expert_groups": Arm("groups of experts by task", groups, reads_task=True),
        "expert_group_prior": Arm(
            "a prior of 1 for groups by task", groups | {"expert_group_prior": 1.0}, reads_task=True
        ),
    }


def _soft_and_expert_choice(settings: Settings) -> dict[str, Arm]:
    every = {"num_experts_per_tok": 8} | NO_BALANCE
    gates = {"router_type": "bernoulli", "scoring_func": "sigmoid"} | NO_BALANCE
    sparse = {"sparsity_loss": 1.0}
    reward = {"policy_gradient_loss": 0.1, "gate_variance_loss": 0.1}
    # Merging all 8 experts for every 8 tokens is as much arithmetic as the second expert of plain top-k.
    merge = {"router_type": "segment_merge", "router_kwargs": {"segment_length": 8}}
    return {
        "expert_threshold": Arm("expert thresholds", {"router_type": "expert_threshold"} | NO_BALANCE),
        "expert_choice": Arm("expert choice", {"router_type": "expert_choice"} | NONCAUSAL | NO_BALANCE),
        "segment_merge": Arm("segments of 8, merged", merge | every),
        "dense": Arm(
            "dense gate, 8 of F / 4", {"router_type": "dense"} | every, "granular", {"shards": 4}, changes="experts"
        ),
        "dense_margin": Arm(
            "dense gate with a margin of 1",
            {"router_type": "dense_margin", "router_kwargs": {"margin": 1.0}} | every,
            "granular",
            {"shards": 4},
            changes="experts",
        ),
        "likelihood": Arm(
            "dense gate, 2 experts, likelihoods mixed",
            {"router_type": "dense", "output_mixture": "likelihood", "num_experts": 2} | NO_BALANCE,
            changes="experts",
        ),
        "bernoulli": Arm("independent gates, straight-through", gates | {"router_loss_coefs": sparse}),
        "bernoulli_reinforce": Arm(
            "independent gates, REINFORCE",
            gates | {"router_kwargs": {"estimator": "reinforce"}, "router_loss_coefs": sparse | reward},
        ),
    }


def start_model(arm: Arm, dense: PreTrainedModel, seed: int) -> PreTrainedModel:
    """An arm's model before its first step."""
    if arm.fields is None:
        return dense
    upcycled = {name: value for name, value in arm.config_fields.items() if name not in arm.added}
    upcycled = MOE if arm.new_experts else MOE | upcycled
    # What cannot be exact is calibrated, and its loss before the first step is in the table.
    init = make_initialiser(arm.init, arm.options)
    model = moe_hf.upcycle(dense, init=init, seed=seed, allow_inexact=True, **upcycled)
    if not (arm.added or arm.new_experts):
        return model
    torch.manual_seed(seed)
    config = moe_hf.MoEConfig(text_config=copy.deepcopy(dense.config), **arm.config_fields)
    config.upcycling = model.config.upcycling  # what the experts were divided by
    return take_over(
        model, moe_hf.MoEForCausalLM(config), skip=("mlp.experts.", "mlp.gate.") if arm.new_experts else ()
    )


@torch.no_grad()
def take_over(source: PreTrainedModel, target: PreTrainedModel, skip: tuple[str, ...] = ()) -> PreTrainedModel:
    """Copy what `source` has into `target`, into the first places of larger tensors; return `target`.

    Wider experts compute what they did: new neurons read at random and write nothing at first.

    Args:
        skip (`tuple[str]`): parts of names that stay as they are.
    """
    given = source.state_dict()
    for name, tensor in target.state_dict().items():
        if name not in given or any(part in name for part in skip):
            continue
        new, old = tensor, given[name]
        if name.endswith("gate_up_proj"):
            new, old = (t.unflatten(1, (2, -1)) for t in (new, old))
        if name.endswith("down_proj"):
            new.zero_()
        new[tuple(slice(size) for size in old.shape)].copy_(old)
    return target
