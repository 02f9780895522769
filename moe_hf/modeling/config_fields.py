"""Which names a configuration knows, and where each lives: in the MoE's own fields, or in the dense decoder's.

What a user gives and nothing knows is an error: it would be the result of another method than the one that was meant. What a
file holds and nothing knows is kept, since other tools leave their marks in it.
"""

import copy
import inspect
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from .config_checks import MoEError, nearest_name, raise_moe_errors


logger = logging.get_logger(__name__)

MODEL_TYPE = "moe_hf"
# What transformers takes in for any configuration, or leaves in its file, beyond the fields of `PreTrainedConfig`.
# Classifiers read `pad_token_id`, of families too that have no such field.
# fmt: off
OF_EVERY_CONFIG = frozenset({
    "_attn_implementation", "_attn_implementation_internal", "_commit_hash", "_experts_implementation",
    "_experts_implementation_internal", "_name_or_path", "_output_attentions", "attn_implementation", "auto_map",
    "experts_implementation", "name_or_path", "num_labels", "output_attentions", "pad_token_id", "quantization_config",
    "tie_last_hidden_states", "torch_dtype", "transformers_weights",
})
# What pipelines and AutoTokenizer hand on to a configuration's `from_pretrained`: arguments of models and of tokenizers.
OF_LOADING = frozenset({
    "_commit_hash", "_fast_init", "_from_auto", "_from_pipeline", "adapter_kwargs", "adapter_name", "allow_all_kernels",
    "code_revision", "device_map", "device_mesh", "disable_mmap", "distributed_config", "from_flax", "from_tf",
    "fusion_config", "generation_config", "gguf_file", "ignore_mismatched_sizes", "kernel_config", "key_mapping",
    "low_cpu_mem_usage", "max_memory", "mirror", "offload_buffers", "offload_folder", "offload_state_dict",
    "output_loading_info", "proxies", "state_dict", "subfolder", "tp_plan", "tp_size", "tqdm_class", "trust_remote_code",
    "use_kernels", "use_safetensors", "variant", "weights_only",
    "add_bos_token", "add_eos_token", "add_prefix_space", "additional_special_tokens", "backend", "bos_token", "chat_template",
    "clean_up_tokenization_spaces", "cls_token", "do_lower_case", "eos_token", "extra_special_tokens", "fix_mistral_regex",
    "from_slow", "legacy", "mask_token", "model_input_names", "model_max_length", "pad_token", "padding_side", "sep_token",
    "split_special_tokens", "tokenizer_file", "tokenizer_object", "tokenizer_type", "truncation_side", "unk_token", "use_fast",
    "vocab_file",
})
# fmt: on
# Dense families with experts of their own have fields for them, which a MoE made of their dense layers does not read.
_OF_DENSE_EXPERTS = ("expert", "router")
# What older configurations call a part of another field.
_FORMER_NAMES = dict.fromkeys(("rope_theta", "rope_scaling", "partial_rotary_factor"), "rope_parameters")
_ABSENT = object()


def field_names(config: PreTrainedConfig | type) -> set[str]:
    """The fields that a configuration declares, and what tells which one it is."""
    return {field.name for field in fields(config)} | {"model_type"}


def is_dense_field(name: str, text_config: PreTrainedConfig) -> bool:
    """Whether the dense configuration declares `name`, holds it, or sets something else by it."""
    if not is_at_top(name) or name in OF_EVERY_CONFIG - {"pad_token_id"}:
        return False
    computed = None if hasattr(PreTrainedConfig, name) else inspect.getattr_static(type(text_config), name, None)
    sets_another = name in text_config.attribute_map or (isinstance(computed, property) and computed.fset is not None)
    return sets_another or name in field_names(text_config) or name in vars(text_config)


def is_at_top(name: str) -> bool:
    """Whether `MoEConfig` answers for a dense field `name`: it is nobody's own, and is neither of experts nor of one layer."""
    return not (name.startswith("_") or name == "per_layer_config" or any(word in name for word in _OF_DENSE_EXPERTS))


def sort_fields(
    given: Mapping[str, Any], own: Collection[str], text_config: PreTrainedConfig
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """`given` in three: what `MoEConfig` and every configuration has, what is the dense decoder's, what nothing knows.

    Args:
        given (`Mapping`): values by name.
        own (`Collection[str]`): the fields of `MoEConfig`.
        text_config (`PreTrainedConfig`): of the dense decoder.
    """
    ours, dense, unknown = {}, {}, {}
    for name, value in given.items():
        if name in own:
            part = ours
        elif is_dense_field(name, text_config):
            part = dense
        else:
            part = ours if name in OF_EVERY_CONFIG else unknown
        part[name] = value
    return ours, dense, unknown


def take_fields(
    text_config: dict | PreTrainedConfig | None, given: Mapping[str, Any], own: Collection[str]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """What a user gives for a `MoEConfig`: the dense configuration that comes of it, and the fields that are not dense.

    Args:
        text_config (`dict` or `PreTrainedConfig`): of the dense decoder; neither changed nor kept.
        given (`Mapping`): values by name, of dense fields too.
        own (`Collection[str]`): the fields of `MoEConfig`.

    Raises:
        MoEError: no usable configuration, a name that nothing knows, or values that the dense configuration refuses.
    """
    made = dense_config(text_config)
    ours, dense, unknown = sort_fields(given, own, made)
    refuse_unknown(unknown, own, made)
    _check_token_ids(dense, made)
    if (model_type := ours.pop("model_type", MODEL_TYPE)) != MODEL_TYPE:
        raise MoEError(f"model_type is {model_type!r}, and that of a MoEConfig is {MODEL_TYPE!r}: leave it out.")
    if not isinstance(text_config, dict):
        return with_fields(made, dense), ours
    refuse_strays(text_config, made)
    for name, value in dense.items():
        inside = _stated(text_config, made, name)
        if inside is not _ABSENT and inside != value:
            raise MoEError(f"{name} is {value!r}, and {inside!r} in text_config. Give it once.")
    return dense_config(text_config | dense) if dense else made, ours


@raise_moe_errors
def dense_config(text_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    """A configuration of the dense decoder that is nobody else's.

    Raises:
        MoEError: none is given, one that only remote code has, or one that has experts already.
    """
    if not isinstance(text_config, dict | PreTrainedConfig):
        raise MoEError(
            f"MoEConfig needs text_config, the configuration of the dense decoder, and got {text_config!r}. "
            "Pass AutoConfig.from_pretrained(...) of a dense model, or its dict."
        )
    if isinstance(text_config, PreTrainedConfig):
        made = copy.deepcopy(text_config)
    elif "auto_map" in text_config:
        raise MoEError("text_config needs remote code; only decoders that transformers itself has can be used.")
    elif text_config.get("model_type") is None:
        raise MoEError('text_config is a dict without "model_type": name the dense family, such as "llama".')
    elif text_config["model_type"] not in CONFIG_MAPPING:
        raise MoEError(
            f"text_config has the model_type {text_config['model_type']!r}, which transformers does not know."
        )
    else:
        made = CONFIG_MAPPING[text_config["model_type"]](**copy.deepcopy(text_config))
    if made.model_type == MODEL_TYPE:
        raise MoEError("text_config is a MoEConfig, which has experts already; give its own text_config.")
    return made


def with_fields(text_config: PreTrainedConfig, given: Mapping[str, Any]) -> PreTrainedConfig:
    """`text_config` with other values, made anew so that what follows from them is computed and checked.

    Raises:
        MoEError: its class refuses them.
    """
    if not given:
        return text_config
    given = {text_config.attribute_map.get(name, name): value for name, value in given.items()}
    try:
        made = type(text_config)(**(text_config.to_dict() | given))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        values = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise MoEError(f"text_config, a {type(text_config).__name__}, refuses {values}: {error}") from error
    made._attn_implementation = text_config._attn_implementation
    return made


def fields_of_file(
    given: Mapping[str, Any], options: Mapping[str, Any], own: Collection[str], *, hands_on: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """What a file holds, and what a user wants otherwise: the fields of a `MoEConfig`, marks in the file that nothing knows,
    and options that transformers sets by rules of its own. Warns of what is not read.

    A dense field at the top of a file, where `to_dict` writes them, says again what `text_config` says, which is read.

    Args:
        given (`Mapping`): of the file.
        options (`Mapping`): of the user.
        own (`Collection[str]`): the fields of `MoEConfig`.
        hands_on (`bool`): whether options that are no fields are for somebody else.

    Raises:
        MoEError: no usable `text_config`, or a name that the user gave and nothing knows.
    """
    text_config = dense_config(given.get("text_config"))
    ours, dense, marks = sort_fields(given, own, text_config)
    inside = given["text_config"] if isinstance(given["text_config"], dict) else text_config.to_dict()
    stated = {name: _stated(inside, text_config, name) for name in dense}
    ours |= {name: value for name, value in dense.items() if stated[name] is _ABSENT}
    others = [name for name, value in stated.items() if value is not _ABSENT and value != dense[name]]
    if others:
        listed = ", ".join(f"{name}={dense[name]!r}" for name in others)
        logger.warning(
            f"The configuration has {listed} beside text_config, which says otherwise: text_config is used."
        )
    if any(callable(getattr(PreTrainedConfig, name, None)) for name in marks):
        raise MoEError(
            f"The configuration has {sorted(marks)}, and of these some are names of functions: remove them."
        )
    if marks:
        listed = _with_nearest(marks, own, text_config)
        logger.warning(f"The configuration has fields that are kept and that moe_hf does not read: {listed}")
    changed = options.get("text_config", {})
    if isinstance(changed, dict):
        changed, text_config = with_fields(text_config, changed), changed
        refuse_strays(text_config, changed)
    chosen, dense, unknown = sort_fields(options, own, changed)
    if not hands_on:
        refuse_unknown(unknown.keys() - OF_LOADING, own, changed)
    by_rules = {n: value for n, value in chosen.items() if n in OF_EVERY_CONFIG or n == "dtype"}
    fields = ours | dense | {n: value for n, value in chosen.items() if n not in by_rules} | {"text_config": changed}
    # "auto" is for who reads the weights.
    return fields, marks, {n: value for n, value in by_rules.items() if value != "auto"} | unknown


def refuse_unknown(
    unknown: Collection[str], own: Collection[str], text_config: PreTrainedConfig, owner: str = "MoEConfig"
) -> None:
    """Refuse names that a user gave to `owner` and nothing knows.

    Raises:
        MoEError: with the nearest name of a field for each.
    """
    if unknown:
        generation = [name for name in unknown if name in vars(GenerationConfig())]
        advice = f" For generation set {', '.join(generation)} in the model's generation_config." * bool(generation)
        raise MoEError(f"{owner} has no field {_with_nearest(unknown, own, text_config)}{advice}")


def refuse_strays(given: Mapping[str, Any], made: PreTrainedConfig) -> None:
    """Refuse names in a user's dict of a dense configuration that `made`, which came of it, has no use for.

    Raises:
        MoEError: with the nearest names.
    """
    if "transformers_version" in given:
        return  # transformers wrote it, perhaps from a file with the marks of other tools
    declared = field_names(made) | made.attribute_map.keys() | OF_EVERY_CONFIG
    strays = {name for name in given if name in vars(made) and not name.startswith("_")} - declared
    strays -= vars(type(made)()).keys() if strays else set()
    if strays:
        raise MoEError(
            f"{type(made).__name__} has no field {_with_nearest(strays, (), made)} Leave it out, or pass a configuration "
            "object, whose fields are kept as they are."
        )


def _check_token_ids(given: Mapping[str, Any], text_config: PreTrainedConfig) -> None:
    vocab_size = given.get("vocab_size", getattr(text_config, "vocab_size", None))
    for name, value in given.items():
        ids = value if isinstance(value, list) else [value]
        outside = [i for i in ids if isinstance(i, int) and isinstance(vocab_size, int) and not 0 <= i < vocab_size]
        if name.endswith("_token_id") and outside:
            raise MoEError(f"{name} is {value}; the ids of tokens are 0 to {vocab_size - 1}.")


def _stated(given: Mapping[str, Any], made: PreTrainedConfig, name: str) -> Any:
    """What a dict of a dense configuration says of the field `name`, under whichever of its names."""
    real = made.attribute_map
    return next((value for n, value in given.items() if real.get(n, n) == real.get(name, name)), _ABSENT)


def _with_nearest(unknown: Collection[str], own: Collection[str], text_config: PreTrainedConfig) -> str:
    """The names, each with the nearest one of a field."""
    dense = {name for name in field_names(text_config) | text_config.attribute_map.keys() if is_at_top(name)}
    known = sorted({*own} | dense)
    nearest = {name: nearest_name(_FORMER_NAMES.get(name, name), known) for name in unknown}
    return " ".join(
        f"{name!r}; the nearest is {other!r}." if other else f"{name!r}." for name, other in nearest.items()
    )
