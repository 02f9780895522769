"""What a dense model, or its checkpoint, must be to become experts: checked before anything is loaded or written."""

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from moe_hf.dense_sources import INSTEAD, quantization_name, quantization_settings, refuse_quantized_names
from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_classes import decoder_class
from moe_hf.modeling.modeling_moe import MoEPreTrainedModel


# By one of these a configuration says how deep a model is; a group of fields, such as those of an attention, has none.
DEPTH_FIELDS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_blocks", "depth")


def check_dense_config(config: PreTrainedConfig, name: str) -> None:
    """Refuse the configuration of what is no plain dense decoder.

    Args:
        config (`PreTrainedConfig`): as it is stored beside the weights, with all parts of the model.
        name (`str`): of the model, for the errors.

    Raises:
        MoEError: it has experts of this package, parts beside a text decoder, or quantised weights, or is no decoder.
    """
    if isinstance(config, MoEConfig):
        raise MoEError(f"{name} is a moe_hf model already; give a dense model.")
    _refuse_parts(_parts_of_config(config), config, name)
    if quantization_settings(config) is not None:
        raise MoEError(f"{name} is quantized by {quantization_name(quantization_settings(config))}. {INSTEAD}")
    decoder_class(config, MODEL_FOR_CAUSAL_LM_MAPPING)


def check_dense_model(model: PreTrainedModel, name: str) -> None:
    """Refuse a model that is no dense decoder with a head.

    Raises:
        MoEError: as `check_dense_config`, or there is no head.
    """
    if isinstance(model, MoEPreTrainedModel):
        raise MoEError(f"The source is a {type(model).__name__}, which already has experts; give a dense model.")
    others = {
        type(module.config).__name__
        for module in model.modules()
        if isinstance(module, PreTrainedModel) and type(module.config) is not type(model.config)
    }
    _refuse_parts(sorted(others), model.config, name)
    check_dense_config(model.config, name)
    if not model.can_generate():
        raise MoEError(
            f"The source is a {type(model).__name__}, which has no language-modelling head: load the causal language model "
            "that it was made from with AutoModelForCausalLM."
        )


def check_dense_weights(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose numbers are not all there, as floating-point numbers.

    Raises:
        MoEError: weights are quantised or offloaded.
    """
    for parameter_name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            raise MoEError(f"{parameter_name} of {name} is {parameter.dtype}: the model is quantized. {INSTEAD}")
        if parameter.is_meta:
            raise MoEError(
                f"{parameter_name} of {name} is offloaded: load the model without device_map, or give its folder to "
                "moe_hf.upcycle_checkpoint, which reads one tensor at a time."
            )


def check_all_loaded(model: PreTrainedModel, report: Mapping[str, Any], name: str) -> None:
    """Refuse a model of which some weights were not in its files, and are random.

    Args:
        model (`PreTrainedModel`): as it was loaded.
        report (`Mapping`): what `from_pretrained` gives with `output_loading_info=True`.
        name (`str`): of the checkpoint, for the error.

    Raises:
        MoEError: naming them, or quantized tensors that nothing says how to read.
    """
    refuse_quantized_names(report["unexpected_keys"], name)
    missing = sorted(report["missing_keys"])
    if missing:
        raise MoEError(
            f"{name} has no tensors for {missing[:4]} of {type(model).__name__}, which would be random: give a whole checkpoint "
            "of a causal language model."
        )


def _refuse_parts(parts: Sequence[str], config: PreTrainedConfig, name: str) -> None:
    if parts:
        raise MoEError(
            f"{name} is a {config.model_type} model, which has parts beside a text decoder ({', '.join(parts)}), and they would "
            "be lost: nothing was made. Give a model that is a text decoder alone."
        )


def _parts_of_config(config: PreTrainedConfig) -> list[str]:
    """What a configuration describes beside one text decoder, or around it."""
    text = config.get_text_config(decoder=True)
    inside = [
        name for name, value in vars(config).items() if isinstance(value, PreTrainedConfig) and value is not text
    ]
    if type(text) is not type(config):
        return inside or [type(config).__name__]
    # Of a decoder's own, an attention's fields are no part; and what the stored class leaves out is not lost.
    inside = [name for name in inside if any(hasattr(getattr(config, name), field) for field in DEPTH_FIELDS)]
    causal = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_alone = not config.architectures or getattr(causal, "__name__", None) in config.architectures
    return [] if is_alone else inside
