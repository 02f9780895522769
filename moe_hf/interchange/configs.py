"""Configs of native MoE families made from ours, and ours from theirs; what cannot be said exactly is said why.

Both directions are one: a native config is accepted when the config that is made from it gives it back.

Letters: F expert width, K experts per token.
"""

import copy
import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from moe_hf.errors import MoEError
from moe_hf.interchange.description import UNUSED, Family, Twin, dense_layers
from moe_hf.interchange.families import FAMILIES, WITHOUT_TARGET, WITHOUT_TWIN
from moe_hf.modeling.config_checks import beyond_plain_blocks
from moe_hf.modeling.configuration_moe import MoEConfig


# What a native config carries of ours that it has no field for; other readers pass it by.
CARRIED = "moe_hf"
# Facts of a file, not of a model.
_OF_THE_FILE = {"model_type", "architectures", "auto_map", "transformers_version", "dtype", "_name_or_path", CARRIED}
# Native fields that are read only where another field does not say the same.
_UNREAD = {"sliding_window_pattern", "sep_token_id"}
# Of a quotient that the way back multiplies again, so that it ends where it began.
_SIGNIFICANT_DIGITS = 12


def exact_targets(config: MoEConfig) -> dict[str, str | None]:
    """Which native families can hold a model of this config exactly.

    Args:
        config (`MoEConfig`): weights are not needed.

    Returns:
        `dict[str, str | None]`: each family that is known, in the order in which `"auto"` tries them; None where the
        model can be exported as it is, else the first reason why not.
    """
    return {target: next(_reasons(config, target), None) for target in FAMILIES}


def choose_target(config: MoEConfig, target: str) -> str:
    """The native family to export to: `target` itself, or with `"auto"` the first exact one.

    Raises:
        MoEError: for an unknown name, or a family that cannot hold the model exactly, with the reason.
    """
    if target != "auto" and target not in FAMILIES:
        raise MoEError(f"There is no target {target!r}; it is 'auto' or one of {list(FAMILIES)}.")
    reasons = exact_targets(config)
    exact = [name for name, reason in reasons.items() if reason is None]
    dense = config.text_config.model_type
    if target == "auto" and exact:
        return exact[0]
    if target == "auto":
        near = {name: reason for name, reason in reasons.items() if dense in FAMILIES[name].twins}
        why = "; ".join(f"{name}: {reason}" for name, reason in near.items())
        why = why or WITHOUT_TARGET.get(dense, f"None has the attention and the norms of {dense}")
        raise MoEError(f"No native MoE family of transformers holds this model exactly. {_sentence(why)}")
    if reasons[target] is not None:
        others = f"Exact targets are {exact}." if exact else "No target is exact."
        raise MoEError(f"{target} cannot hold this model exactly: {_sentence(reasons[target])} {others}")
    return target


def native_config(config: MoEConfig, target: str) -> PreTrainedConfig:
    """The config of the native family `target` for a model of `config`, which it can hold exactly.

    Under `moe_hf` it carries the fields of `config` that would be lost, such as `upcycling`, for the way back.
    """
    native = _to_native(config, target)
    family, dense = FAMILIES[target], config.text_config.model_type
    facts = {
        "zero_shared": config.shared_expert_intermediate_size == 0,
        "zero_bias": config.balance_strategy != "bias",
    }
    back = _to_ours(native, family, dense, **facts).to_diff_dict()
    carried = _difference(config.to_diff_dict(), back)
    carried["text_config"] = {"model_type": dense, **_difference(config.text_config.to_dict(), back["text_config"])}
    setattr(native, CARRIED, carried)
    return native


def moe_config(native: PreTrainedConfig, *, zero_shared: bool, zero_bias: bool) -> MoEConfig:
    """Our config for a model of a native config.

    Args:
        native (`PreTrainedConfig`): of a family in `FAMILIES`.
        zero_shared (`bool`): whether its shared expert is all zeros.
        zero_bias (`bool`): whether the biases that its routers add for choosing only are all zeros.

    Raises:
        MoEError: it cannot be said without loss; naming the fields that would change.
    """
    family = FAMILIES[native.model_type]
    attempts: list[tuple[str, dict[str, Any] | None]] = [(dense, None) for dense in family.twins]
    carried = getattr(native, CARRIED, None)
    if isinstance(carried, dict):
        dense = (carried.get("text_config") or {}).get("model_type")
        attempts = [(dense, carried)] * (dense in family.twins) + attempts
    reasons = []
    for dense, extra in attempts:
        try:
            config = _to_ours(native, family, dense, zero_shared=zero_shared, zero_bias=zero_bias, carried=extra)
            reasons.append(_lost(native, config) or next(_reasons(config, native.model_type), None))
        except (ValueError, TypeError, StrictDataclassError) as error:
            reasons.append(str(error))
        if reasons[-1] is None:
            return config
    # What was carried may be out of date, so the reason is that of the first twin as such.
    reason = reasons[len(attempts) - len(family.twins)]
    raise MoEError(f"This {native.model_type} model cannot be held without loss: {_sentence(reason)}")


def check_importable(model_type: str) -> None:
    """Refuse a native family that is not known, with the reason where one is.

    Raises:
        MoEError: naming the families that are.
    """
    if model_type not in FAMILIES:
        reason = WITHOUT_TWIN.get(model_type, "no dense family is known whose layers it has, apart from its experts")
        raise MoEError(f"{model_type} cannot be imported: {reason}. Families that can be are {list(FAMILIES)}.")


def warnings_for(config: MoEConfig, target: str) -> list[str]:
    """What a reader of the exported checkpoint should know, though the checkpoint is exact."""
    family = FAMILIES[target]
    texts = [] if family.note is None else [family.note]
    if family.gguf_norm is not None and config.norm_topk_prob != family.gguf_norm:
        texts.append(
            f"llama.cpp takes norm_topk_prob of {target} for {family.gguf_norm} whatever the config says, and this model has "
            f"{config.norm_topk_prob}: a GGUF file of it would compute something else. transformers reads the field"
        )
    if family.shared is not None and family.shared.gated and config.shared_expert_intermediate_size == 0:
        texts.append(
            f"{target} has a shared expert always, here one of zeros with a gate of zero: llama.cpp divides by what the gate "
            "says, so that a GGUF file of it would compute NaN. transformers and vLLM do not"
        )
    heads, size = config.num_attention_heads, getattr(config, "head_dim", None)
    if family.servers_divide is not None and size and size * heads != config.hidden_size:
        texts.append(
            f"{family.servers_divide} take hidden_size / num_attention_heads, {config.hidden_size} / {heads}, for the size of a "
            f"head of {target}, and this model's is {size}: they fail, or compute something else. transformers reads head_dim"
        )
    return texts


def _reasons(config: MoEConfig, target: str) -> Iterator[str]:
    """Why the family cannot hold a model of this config; nothing when it can."""
    family, dense = FAMILIES[target], config.text_config
    twin = family.twins.get(dense.model_type)
    if twin is None:
        of = WITHOUT_TARGET.get(dense.model_type)
        twins = f"it has {family.decoder}, and {dense.model_type} does not; it holds {', '.join(family.twins)}"
        yield twins if of is None else f"no native family holds {dense.model_type}: {of}"
        return
    yield from _reasons_of_dense(dense, twin, target)
    yield from _reasons_of_routing(config, family)
    yield from _reasons_of_experts(config, family, twin)


def _reasons_of_dense(dense: PreTrainedConfig, twin: Twin, target: str) -> Iterator[str]:
    for name, value in twin.requires.items():
        if getattr(dense, name) != value:
            yield f"{name}={getattr(dense, name)} of {dense.model_type}, and it computes {name}={value} only"
    for check in twin.checks:
        reason = check.reason(dense)
        if reason is not None:
            yield reason
    known = {"intermediate_size", "head_dim", *UNUSED, *twin.requires, *twin.sets}
    known |= {name for check in twin.checks for name in check.fields} | _declared(target)
    unknown = sorted(_declared(dense.model_type) - known)
    if unknown:
        yield f"it has no fields for {unknown} of {dense.model_type}"


def _reasons_of_routing(config: MoEConfig, family: Family) -> Iterator[str]:
    for field in beyond_plain_blocks(config):
        yield f"{field}, and it has equal experts behind a linear router that chooses the top K for each token"
    if config.router_kwargs:
        yield f"router_kwargs={config.router_kwargs}, and it routes by plain top_k"
    if config.scoring_func not in family.scoring:
        yield f"scoring_func={config.scoring_func!r}, and its router takes {' or '.join(family.scoring)}"
    normalises = family.norm_topk_prob is None or (
        family.scoring_field is not None and config.scoring_func == "softmax"
    )
    if normalises and not config.norm_topk_prob:
        yield "norm_topk_prob=False, and it always divides the weights of a token by their sum"
    if family.routed_scaling_factor is None and config.routed_scaling_factor != 1:
        yield f"routed_scaling_factor={config.routed_scaling_factor}, and it has no such factor"
    if config.balance_strategy == "bias" and family.names.correction_bias is None:
        yield "balance_strategy='bias', and its router has no bias for choosing"
    if config.n_group is not None:
        yield f"n_group={config.n_group}, and it is written without groups of experts"
    if config.eval_capacity_factor is not None:
        yield f"eval_capacity_factor={config.eval_capacity_factor}, and it serves every choice"
    if config.router_noise == "learned":
        yield "router_noise='learned', and its router has no weights for noise"
    if config.num_experts < family.least_experts:
        yield f"num_experts={config.num_experts}, and it needs {family.least_experts}"


def _reasons_of_experts(config: MoEConfig, family: Family, twin: Twin) -> Iterator[str]:
    width, shared = config.shared_expert_intermediate_size, family.shared
    if width and shared is None:
        yield f"shared_expert_intermediate_size={width}, and it has no shared expert"
    elif width and shared.gated != config.shared_expert_gate:
        yield f"shared_expert_gate={config.shared_expert_gate}, and its shared expert {_has(shared.gated)} a gate"
    elif width and shared.unit == "F" and width % _width(config, twin):
        yield f"the shared expert is {width} wide, and its are multiples of the routed experts' {_width(config, twin)}"
    elif width and shared.field is None and width != _width(config, twin):
        yield f"the shared expert is {width} wide, and its is as wide as a routed one, {_width(config, twin)}"
    layers = dense_layers(config)
    if layers and family.layers is None:
        yield f"layers {layers} are dense, and all of its layers have experts"
    elif layers and family.layers.to_native(config) is None:
        yield f"layers {layers} are dense, and in it {family.layers.says}"


def _to_native(config: MoEConfig, target: str) -> PreTrainedConfig:
    # Some config classes change the values that they are given.
    config = copy.deepcopy(config)
    family, dense = FAMILIES[target], config.text_config
    twin, native_class = family.twins[dense.model_type], CONFIG_MAPPING[target]
    width = _width(config, twin)
    lacking = _declared(dense.model_type) - _declared(target) - {"head_dim"}
    fields = {name: v for name, v in dense.to_dict().items() if name not in lacking | _OF_THE_FILE}
    fields = family.servers_read | fields
    if "head_dim" in _declared(target):
        fields["head_dim"] = fields.get("head_dim") or dense.hidden_size // dense.num_attention_heads
    if family.dense_width is not None:
        # A field that is for dense layers alone is empty where there are none.
        of_all = family.dense_width == "intermediate_size"
        fields[family.dense_width] = twin.dense_width(dense) if of_all or dense_layers(config) else None
    fields |= _resolved(twin.sets, dense) | _resolved(family.constants, config)
    fields |= {
        family.num_experts: config.num_experts,
        family.num_experts_per_tok: config.num_experts_per_tok,
        family.width: width,
        "output_router_logits": config.output_router_logits,
    }
    if family.norm_topk_prob is not None:
        fields[family.norm_topk_prob] = config.norm_topk_prob
    if family.routed_scaling_factor is not None:
        fields[family.routed_scaling_factor] = config.routed_scaling_factor
    if family.scoring_field is not None:
        fields[family.scoring_field] = family.scoring[config.scoring_func]
    if family.shared is not None and family.shared.field is not None:
        unit = width if family.shared.unit == "F" else 1
        fields[family.shared.field] = config.shared_expert_intermediate_size // unit or family.shared.least
    if family.layers is not None:
        fields |= family.layers.to_native(config)
    if "router_aux_loss_coef" in _declared(target):
        # Ours is 1 at perfect balance, transformers' is K.
        coefficient = config.router_aux_loss_coef / config.num_experts_per_tok
        fields["router_aux_loss_coef"] = float(f"{coefficient:.{_SIGNIFICANT_DIGITS}g}")
    return native_class(**fields, dtype=config.dtype)


def _to_ours(
    native: PreTrainedConfig,
    family: Family,
    dense: str,
    *,
    zero_shared: bool,
    zero_bias: bool,
    carried: dict[str, Any] | None = None,
) -> MoEConfig:
    twin = family.twins[dense]
    width = getattr(native, family.width)
    # Some config classes change the values that they are given.
    native = copy.deepcopy(native)
    text = _unknown(native, family) | {
        name: getattr(native, name) for name in _declared(dense) if hasattr(native, name)
    }
    text |= twin.requires | {name: value(native) for name, value in twin.restores.items()}
    text["intermediate_size"] = width if family.dense_width is None else getattr(native, family.dense_width) or width
    usual = native.hidden_size // native.num_attention_heads
    head_dim = getattr(native, "head_dim", None) or usual
    if "head_dim" in _declared(dense) or head_dim != usual:
        text["head_dim"] = head_dim
    fields: dict[str, Any] = {
        "num_experts": getattr(native, family.num_experts),
        "num_experts_per_tok": getattr(native, family.num_experts_per_tok),
        "moe_intermediate_size": width,
        "output_router_logits": native.output_router_logits,
        "norm_topk_prob": True if family.norm_topk_prob is None else getattr(native, family.norm_topk_prob),
        "scoring_func": _scoring(native, family),
        "balance_strategy": "loss" if zero_bias else "bias",
    }
    if family.routed_scaling_factor is not None:
        fields["routed_scaling_factor"] = getattr(native, family.routed_scaling_factor)
    if family.shared is not None:
        fields |= _shared_fields(native, family, width, zero_shared)
    if family.layers is not None:
        fields |= family.layers.to_ours(native)
    if "router_aux_loss_coef" in _declared(native.model_type):
        fields["router_aux_loss_coef"] = native.router_aux_loss_coef * fields["num_experts_per_tok"]
    carried = carried or {}
    text |= copy.deepcopy(_difference(carried.get("text_config", {}), {}))
    text_config = CONFIG_MAPPING[dense](**text, dtype=native.dtype)
    fields |= _difference(carried, {}) | {"text_config": text_config, "dtype": native.dtype}
    return MoEConfig.from_dict(fields)


def _unknown(native: PreTrainedConfig, family: Family) -> dict[str, Any]:
    """Fields that the native class does not declare, which are somebody's own, and set ones that nothing reads."""
    known = (
        _declared(native.model_type) | _OF_THE_FILE | set(native.attribute_map) | set(native.attribute_map.values())
    )
    fields, usual = _difference(native.to_dict(), family.servers_read), type(native)()
    kept = {name for name in _UNREAD & fields.keys() if fields[name] != getattr(usual, name)}
    return {name: value for name, value in fields.items() if name not in known or name in kept}


def _shared_fields(native: PreTrainedConfig, family: Family, width: int, zero_shared: bool) -> dict[str, Any]:
    shared = family.shared
    count = 1 if shared.field is None else getattr(native, shared.field)
    if count == shared.least and (zero_shared or count == 0):
        return {}
    return {
        "shared_expert_intermediate_size": count * (width if shared.unit == "F" else 1),
        "shared_expert_gate": shared.gated,
    }


def _scoring(native: PreTrainedConfig, family: Family) -> str:
    if family.scoring_field is None:
        return next(iter(family.scoring))
    value = getattr(native, family.scoring_field)
    return next((name for name, said in family.scoring.items() if said == value), str(value))


def _width(config: MoEConfig, twin: Twin) -> int:
    return config.moe_intermediate_size or twin.dense_width(config.text_config)


@cache
def _declared(model_type: str) -> frozenset[str]:
    """Fields of a config class beyond those of every config."""
    of_all = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return frozenset(field.name for field in dataclasses.fields(CONFIG_MAPPING[model_type])) - of_all


def _plain(native: PreTrainedConfig) -> dict[str, Any]:
    """The fields that decide what a native model is: what its class declares, and what its code reads besides."""
    read = {native.attribute_map.get(name, name) for name in _declared(native.model_type) - _UNREAD}
    fields = {name: value for name, value in native.to_dict().items() if name in read | {"rope_parameters"}}
    head_dim = getattr(native, "head_dim", None)
    return fields | {"head_dim": head_dim or native.hidden_size // native.num_attention_heads}


def _resolved(values: dict[str, Any], config: PreTrainedConfig) -> dict[str, Any]:
    """Values, and those of them that are functions of a config, at that config."""
    return {name: value(config) if callable(value) else value for name, value in values.items()}


def _difference(fields: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Those of `fields` that `others` lacks or has otherwise."""
    absent = object()
    return {
        name: value
        for name, value in fields.items()
        if name not in _OF_THE_FILE | {"text_config"} and others.get(name, absent) != value
    }


def _lost(native: PreTrainedConfig, config: MoEConfig) -> str | None:
    """The fields of a native config that would not come back from ours, or None when all would."""
    lost = _difference(_plain(native), _plain(_to_native(config, native.model_type)))
    fields = ", ".join(f"{name}={value!r}" for name, value in lost.items())
    return f"our model has no place for {fields}" if lost else None


def _has(fact: bool) -> str:
    return "has" if fact else "does not have"


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."
