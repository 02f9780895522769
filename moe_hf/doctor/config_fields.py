"""What a configuration says of routing, beside the base's, and beside what other readers of the folder make of it."""

from typing import Any

from transformers import PreTrainedConfig

from moe_hf.doctor.findings import NOTE, WARNING, Report
from moe_hf.inspection import EXPERT_COUNT_NAMES, EXPERTS_PER_TOKEN_NAMES
from moe_hf.interchange.families import FAMILIES
from moe_hf.modeling.configuration_moe import MoEConfig


# Fields that decide which experts a token gets, with which weight, and what an expert computes.
ROUTING = (
    "norm_topk_prob",
    "scoring_func",
    "routed_scaling_factor",
    "n_group",
    "topk_group",
    "topk_method",
    "router_type",
    "moe_apply_router_weight_on_input",
    "norm_min",
    "hidden_act",
    "hidden_activation",
    "mlp_hidden_act",
    "swiglu_limit",
    "router_jitter_noise",
    "use_grouped_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_use_sigmoid",
)


def first_of(config: PreTrainedConfig, names: tuple[str, ...]) -> Any:
    """The first of some fields that a configuration has a whole number in, or None."""
    text = config.get_text_config()
    return next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)


def look_at_fields(report: Report, config: PreTrainedConfig, base: PreTrainedConfig | None) -> None:
    """Add what of the routing differs from the base's configuration, and what no training can reach."""
    text, per_token = config.get_text_config(), first_of(config, EXPERTS_PER_TOKEN_NAMES)
    always = getattr(FAMILIES.get(config.model_type), "norm_topk_prob", "norm_topk_prob") is None
    if per_token == 1 and (getattr(text, "norm_topk_prob", False) or always) and _is_softmax(text):
        report.add(
            NOTE,
            "router-untrainable",
            "One expert per token whose weight is divided by itself: it is always 1, and the loss of the language model cannot reach "
            "the router. Set norm_topk_prob to false before training, or 2 experts per token.",
            figure=1,
        )
    if base is None or (type(base) is not type(config) and base.model_type != config.model_type):
        return
    other = base.get_text_config()
    if first_of(config, EXPERT_COUNT_NAMES) != first_of(base, EXPERT_COUNT_NAMES):
        return
    differing = [
        f"{name} is {getattr(text, name)!r}, the base's {getattr(other, name)!r}"
        for name in (*ROUTING, *EXPERTS_PER_TOKEN_NAMES)
        if hasattr(text, name) and hasattr(other, name) and getattr(text, name) != getattr(other, name)
    ]
    if differing:
        report.add(
            WARNING,
            "routing-config-changed",
            f"{'; '.join(differing)}: the same weights compute something else. Take over the base's, unless the model was trained "
            "otherwise.",
            part="config.json",
            figure=len(differing),
        )


def _is_softmax(text: PreTrainedConfig) -> bool:
    return getattr(text, "scoring_func", "softmax") == "softmax" and text.model_type != "llama4_text"


def look_at_servers(report: Report, config: PreTrainedConfig) -> None:
    """Add fields that other readers of the folder are known to take otherwise."""
    family = None if isinstance(config, MoEConfig) else FAMILIES.get(config.model_type)
    if family is None:
        return
    text = config.get_text_config()
    norm = getattr(text, "norm_topk_prob", None)
    if family.gguf_norm is not None and isinstance(norm, bool) and norm != family.gguf_norm:
        report.add(
            NOTE,
            "servers-differ",
            f"llama.cpp takes norm_topk_prob of {config.model_type} for {family.gguf_norm} whatever config.json says, and this model has "
            f"{norm}: a GGUF file of it computes something else. transformers and vLLM read the field.",
            part="config.json",
        )
    heads, size = getattr(text, "num_attention_heads", None), getattr(text, "head_dim", None)
    if family.servers_divide is not None and heads and size and size * heads != text.hidden_size:
        report.add(
            NOTE,
            "servers-differ",
            f"{family.servers_divide} take hidden_size / num_attention_heads for the size of a head of {config.model_type}, and this "
            f"model's is {size}: they fail, or compute something else.",
            part="config.json",
        )
