"""Which class of transformers a MoE is combined with: a decoder, or a classifier of its family or with a generic head."""

import inspect
from collections.abc import Collection
from functools import cache

from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.modeling_outputs import BaseModelOutput

from .config_checks import MoEError
from .config_fields import field_names, refuse_unknown, sort_fields


# What a classifier's configuration says of its labels; the dense head reads it from text_config.
LABEL_FIELDS = ("id2label", "label2id", "problem_type")


def decoder_class(text_config: PreTrainedConfig, mapping) -> type:
    """What `mapping`, an Auto mapping of transformers, has for a decoder.

    Raises:
        MoEError: the family has no such class, or is no decoder.
    """
    not_decoder = f"text_config is a {type(text_config).__name__}, which is not a decoder; give a causal LM's."
    if text_config.is_encoder_decoder:
        raise MoEError(not_decoder)
    try:
        dense = mapping[type(text_config)]
    except KeyError:
        raise MoEError(
            f"transformers has no causal language model for {type(text_config).__name__} "
            f"(model_type {text_config.model_type!r}); give the config of a dense decoder."
        ) from None
    dense = dense[0] if isinstance(dense, tuple) else dense
    arguments = inspect.signature(dense.forward).parameters
    # Some pure decoders have the field too, and do not read it; what can be an encoder takes another's states.
    is_encoder = "encoder_hidden_states" in arguments and getattr(text_config, "is_decoder", True) is False
    if is_encoder or "decoder_input_ids" in arguments:
        raise MoEError(not_decoder)
    return dense


def check_model_arguments(config: PreTrainedConfig, given: Collection[str], dense_class: type) -> None:
    """Check a configuration as it is now, and refuse what `from_pretrained` hands on to the model beside it.

    Raises:
        MoEError: a field that was changed since it was checked, or an argument that the dense class does not take.
    """
    config.validate()
    check_activation(config.text_config)
    others = [name for name in given if name not in inspect.signature(dense_class.__init__).parameters]
    ours, dense, unknown = sort_fields(dict.fromkeys(others), field_names(config), config.text_config)
    refuse_unknown(unknown, field_names(config), config.text_config)
    if ours or dense:
        raise MoEError(f"Beside a config there is no place for {', '.join(ours | dense)}: set it in the config.")


def check_activation(text_config: PreTrainedConfig) -> None:
    """Raise `MoEError` when the activation that `text_config` names is not one of transformers'."""
    for name in ("hidden_act", "hidden_activation", "activation_function"):
        value = getattr(text_config, name, None)
        if isinstance(value, str) and value not in ACT2FN:
            raise MoEError(f"{name} of text_config is {value!r}; it must be one of {sorted(ACT2FN)}.")


def classifier_class(text_config: PreTrainedConfig, mapping, generic_head: type) -> type:
    """The dense classifier of a family: what `mapping` of transformers has, or `generic_head` over its decoder.

    Args:
        mapping: an Auto mapping, such as `MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING`.
        generic_head (`type`): transformers' mixin of the same task, such as `GenericForSequenceClassification`.

    Raises:
        MoEError: the family has neither.
    """
    try:
        dense = mapping[type(text_config)]
    except KeyError:
        return with_generic_head(generic_head, _decoder_for_generic_head(text_config, generic_head))
    return dense[0] if isinstance(dense, tuple) else dense


@cache
def with_generic_head(generic_head: type, decoder: type) -> type:
    """The class of `decoder`'s family with transformers' generic head; always the same object."""
    family = next(base for base in decoder.__mro__[1:] if issubclass(base, PreTrainedModel))
    name = f"{decoder.__name__.removesuffix('Model')}{generic_head.__name__.removeprefix('Generic')}"
    namespace = {
        "__module__": decoder.__module__,
        "__qualname__": name,
        "made_from": (generic_head, decoder),
        "base_model_prefix": decoder.base_model_prefix or generic_head.base_model_prefix,
        # transformers would look for the answer in the source of a class that has none.
        "_can_set_attn_implementation_cached_value": decoder._can_set_attn_implementation(),
    }
    return type(name, (generic_head, family), namespace)


def pickled_parents(dense: type) -> tuple[type, ...]:
    """What `unpickled_class` makes `dense` from: the class itself, or the two that it was made from at run time."""
    return dense.__dict__.get("made_from", (dense,))


def unpickled_class(*parents: type) -> type:
    """The inverse of `pickled_parents`."""
    return parents[0] if len(parents) == 1 else with_generic_head(*parents)


def _decoder_for_generic_head(text_config: PreTrainedConfig, generic_head: type) -> type:
    decoder = MODEL_MAPPING.get(type(text_config), None)
    decoder = decoder[0] if isinstance(decoder, tuple) else decoder
    is_model = decoder is not None and issubclass(decoder, PreTrainedModel)
    signature = inspect.signature(decoder.forward if is_model else object)
    # The head of sequences hands on the decoder's cache, which a plain BaseModelOutput has not.
    lacks_cache = generic_head is GenericForSequenceClassification and signature.return_annotation is BaseModelOutput
    if not is_model or "decoder_input_ids" in signature.parameters or lacks_cache:
        task = generic_head.__name__.removeprefix("Generic")
        raise MoEError(
            f"transformers has no {task} for {text_config.model_type!r}, and its generic head fits decoders alone "
            f"that return a cache; {decoder.__name__ if is_model else 'this family'} is not one."
        )
    return decoder
