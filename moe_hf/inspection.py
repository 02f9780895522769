"""What a model is made of: parameters by part, how it routes, memory and arithmetic; read from its configuration.

Letters: E experts, K experts per token.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe_hf.config_files import config_errors, load_config
from moe_hf.errors import MoEError
from moe_hf.finetuning import SCOPES, find_moe_blocks, scope_parameter_names
from moe_hf.finetuning.moe_blocks import whole_shape
from moe_hf.modeling.segment_merge import SEGMENT_LENGTH
from moe_hf.unwrapping import unwrapped


BYTES_PER_PARAMETER = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5}
EXPERT_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS_PER_TOKEN_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
ROUTING_FIELDS = (
    "router_type",
    "router_arch",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "moe_intermediate_size",
    "num_moe_heads",
    "shared_expert_intermediate_size",
    "router_aux_loss_coef",
    "router_z_loss_coef",
)
# The parts that a model's parameters are divided into; each parameter is in the first one that it belongs to.
PARTS = ("embeddings", "experts", "shared", "router", "attention", "ffn", "all")
PART_LABELS = {
    "embeddings": "embeddings and head",
    "experts": "routed experts",
    "shared": "shared experts",
    "router": "routers",
    "attention": "attention",
    "ffn": "dense MLPs",
    "all": "norms and the rest",
}


@dataclass(frozen=True)
class ModelFacts:
    """Facts of one model.

    Attributes:
        name: where it was read from, or its class.
        architecture: the model's class; for ours the dense class is named too.
        num_layers: decoder layers.
        num_moe_layers: layers with experts.
        total_parameters: all parameters; tied weights count once.
        active_parameters: those that one token uses: all but the experts that were not chosen.
        embedding_parameters: token and position embeddings and the output head, part of both counts above.
        parameters_per_part: parameters by part; they add up to the total.
        num_experts: E, the most experts that a layer has; 0 for a dense model.
        num_experts_per_tok: K; 0 for a dense model.
        routing: the routing fields of the configuration.
        memory_bytes: of all parameters, by dtype; no activations, no optimizer.
        flops_per_token: of one forward pass, in multiplications and additions of the weights that a token meets, the
            head included; attention over the context comes on top. A training step takes about three times as many.
        upcycling: what `moe_hf.upcycle` recorded, or None.
    """

    name: str
    architecture: str
    num_layers: int
    num_moe_layers: int
    total_parameters: int
    active_parameters: int
    embedding_parameters: int
    parameters_per_part: dict[str, int]
    num_experts: int
    num_experts_per_tok: int
    routing: dict[str, Any]
    memory_bytes: dict[str, int]
    flops_per_token: int
    upcycling: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def inspect_model(model: PreTrainedModel | str | Path) -> ModelFacts:
    """Count a causal language model's parameters, memory and arithmetic; a path needs no weights.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): a model, a folder with a config.json, or a Hub id; ours, a native
            MoE of transformers, or a dense model.

    Raises:
        MoEError: for a path without a configuration, or one of something else than a causal language model.
    """
    model = unwrapped(model, or_path=True)
    if isinstance(model, PreTrainedModel):
        name = model.name_or_path or type(model).__name__
    else:
        name = str(model)
        model = on_meta(name)
    parts = _parameter_parts(model)
    sizes = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
    per_part = {PART_LABELS[part]: sum(sizes[p] for p in names) for part, names in parts.items() if names}
    used = used_shares(model)
    total = sum(sizes.values())
    blocks = find_moe_blocks(model)
    config = model.config.get_text_config()
    return ModelFacts(
        name=name,
        architecture=_architecture(model),
        num_layers=config.num_hidden_layers,
        num_moe_layers=len(blocks),
        total_parameters=total,
        active_parameters=total - round(sum(sizes[name] * max(0.0, 1 - share) for name, share in used.items())),
        embedding_parameters=per_part.get(PART_LABELS["embeddings"], 0),
        parameters_per_part=per_part,
        num_experts=max((_num_experts(block) for block in blocks.values()), default=0),
        num_experts_per_tok=_experts_per_token(config) if blocks else 0,
        routing={field: getattr(config, field) for field in ROUTING_FIELDS if hasattr(config, field)}
        if blocks
        else {},
        memory_bytes={dtype: round(total * size) for dtype, size in BYTES_PER_PARAMETER.items()},
        flops_per_token=round(sum(_weight_flops(model, used).values())),
        upcycling=getattr(config, "upcycling", None),
    )


def on_meta(path: str) -> PreTrainedModel:
    """The causal language model of a folder or a Hub id without its numbers: modules and shapes, on the meta device.

    Raises:
        MoEError: see [`load_config`]; or something else than a causal language model.
    """
    config = load_config(path)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise MoEError(f"{path} is a {config.model_type} model, which is no causal language model of transformers.")
    with config_errors(path), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def _architecture(model: PreTrainedModel) -> str:
    dense = getattr(model, "_dense_class", None)
    return type(model).__name__ if dense is None else f"{type(model).__name__} of {dense.__name__}"


def _parameter_parts(model: PreTrainedModel) -> dict[str, list[str]]:
    """Names of parameters by part, each in one part only."""
    head = model.get_output_embeddings()
    embeddings = {
        f"{module_name}.{name}" if module_name else name
        for module_name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or (head is not None and module is head)
        for name, _ in module.named_parameters(recurse=False)
    }
    members = {"embeddings": embeddings} | {part: _scope_names(model, part) for part in PARTS if part in SCOPES}
    parts = {part: [] for part in PARTS}
    for name, _ in model.named_parameters():
        parts[next(part for part in PARTS if name in members[part])].append(name)
    return parts


def _scope_names(model: nn.Module, scope: str) -> set[str]:
    try:
        return set(scope_parameter_names(model, scope))
    except MoEError:
        # A scope that matches nothing is an error where something shall train; here the part is empty.
        return set()


def _num_experts(block: nn.Module) -> int:
    experts = block.experts
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    return next(shape[0] for shape in map(whole_shape, experts.parameters()) if len(shape) >= 3)


def _experts_per_token(config: PreTrainedConfig) -> int:
    for name in EXPERTS_PER_TOKEN_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise MoEError(
        f"{type(config).__name__} does not say how many experts a token uses: none of "
        f"{', '.join(EXPERTS_PER_TOKEN_NAMES)} was found."
    )


def used_shares(model: PreTrainedModel) -> dict[str, float]:
    """The share of each routed expert's parameter that one token uses, by name: K / E, of each of its sub-tokens."""
    config, shares = model.config.get_text_config(), {}
    for block_name, block in find_moe_blocks(model).items():
        share = min(_experts_per_token(config), _num_experts(block)) / _num_experts(block)
        share *= getattr(config, "num_moe_heads", 1)
        prefix = f"{block_name}.experts." if block_name else "experts."
        shares |= {f"{prefix}{name}": share for name, _ in block.experts.named_parameters()}
    return shares


def forward_flops(model: PreTrainedModel, context: float) -> float:
    """FLOPs of one token's forward pass: two per weight that it is multiplied with, and attention over `context` tokens.

    Attention is counted over the whole context, in each layer, as if no token were masked.

    Args:
        model (`PreTrainedModel`): a dense model or a MoE, of which K of E experts count.
        context (`float`): tokens of a row.
    """
    return sum(_weight_flops(model, used_shares(model)).values()) + _attention_flops(model, context)


def training_flops(model: PreTrainedModel, context: float) -> float:
    """FLOPs of one token in a training step: forward; gradients of the activations; gradients of the weights that train.

    The second are as many as the first, the third two per trained weight that a token meets. What is frozen below the first
    layer that trains is counted as if gradients went through it, and recomputed activations are not counted.

    Args:
        model (`PreTrainedModel`): whose `requires_grad` says what trains.
        context (`float`): tokens of a row.
    """
    flops = _weight_flops(model, used_shares(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    of_trained = sum(value for name, value in flops.items() if name in trained)
    return 2 * sum(flops.values()) + of_trained + 3 * _attention_flops(model, context)


def _attention_flops(model: PreTrainedModel, context: float) -> float:
    """Scores and weighted sums, two FLOPs per number of each."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if isinstance(heads, int) else 0)
    return 4 * config.num_hidden_layers * context * (heads * width if isinstance(heads, int) else config.hidden_size)


def _weight_flops(model: PreTrainedModel, used: dict[str, float]) -> dict[str, float]:
    """Of one token's forward pass by parameter: two per weight of each matrix that it is multiplied with.

    Embeddings are looked up, not multiplied. Where experts are merged, a token runs through one, and each weight of all is
    added to it once per segment.
    """
    if getattr(model.config, "router_type", None) == "segment_merge":
        length = model.config.router_kwargs.get("segment_length", SEGMENT_LENGTH)
        used = dict.fromkeys(used, 1 / model.config.num_experts + 1 / length)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    flops = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or name.endswith("_bias"):
            continue
        runs = 0.0 if id(parameter) in looked_up else used.get(name, 1.0)
        if head is not None and parameter is head.weight:
            runs = model.config.num_experts if getattr(model.config, "output_mixture", None) else 1.0
        flops[name] = 2 * parameter.numel() * runs
    return flops
