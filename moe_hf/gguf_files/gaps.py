"""What transformers leaves unread of a GGUF file without a word: put in its place where it can be, else refused.

It looks only at the numbers and tensors that it knows for an architecture. The rest may change every logit (the scaling of
rotary frequencies), the ids of a text (how it is cut before merges) or where an answer ends.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.gguf_files.file import INSTEAD, GGUFFile, gguf_tensor


logger = logging.get_logger(__name__)

# Numbers of a file to fields of configurations that mean the same, where a class has the field.
FIELDS = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
}
# Parts of names of numbers that change logits; others, such as the count of a tensor's dimensions, are told.
DECISIVE = ("rope.", "scal", "softcap", "clamp", "sliding", "window", "alibi", "parallel")
# What these say changes nothing by itself.
NEUTRAL = {
    "rope.scaling.finetuned": None,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "attention.causal": True,
}
ROPE_FACTORS = "rope_freqs.weight"
# With these of gemma, attention is scaled by D / heads; llama.cpp knows them by their number of layers.
WIDE_GEMMAS = {("gemma2", 46), ("gemma3", 62)}
# Byte-level vocabularies whose text is cut at each digit before GPT-2's rule; and those with GPT-2's rule alone.
DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
GPT2_SPLITS = {
    "gpt-2",
    "phi-2",
    "mpt",
    "olmo",
    "jais",
    "trillion",
    "roberta-bpe",
    "gigachat",
    "granite-docling",
    "mellum",
}
ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}


def complete_config(file: GGUFFile, config: PreTrainedConfig) -> None:
    """Put into a configuration what the file says and transformers has not read.

    Raises:
        MoEError: naming a number that changes logits and has no place in the configuration.
    """
    if (file.architecture, file.number("block_count")) in WIDE_GEMMAS:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    for name, value in _unread(file):
        field = FIELDS.get(name)
        if field is not None and hasattr(config, field):
            setattr(config, field, value)
        elif name == "rope.freq_base" and "rope_theta" in (getattr(config, "rope_parameters", None) or {}):
            config.rope_parameters["rope_theta"] = value
    if file.architecture == "llama" and hasattr(config, "sliding_window"):
        # A default of Mistral's class, which a file would say.
        config.sliding_window = file.number("attention.sliding_window")
    if ROPE_FACTORS in file.shapes:
        _set_llama3_scaling(file, config)
    known = set(_numbers(config.to_dict())) | {_head_dim(config), _rotary_dim(config)}
    left = {name: value for name, value in _unread(file) if not known.issuperset(_numbers(value))}
    decisive = {name: value for name, value in left.items() if any(part in name for part in DECISIVE)}
    if decisive:
        said = ", ".join(f"{file.architecture}.{name} = {value}" for name, value in decisive.items())
        raise MoEError(
            f"{file.path} says {said}, which transformers does not read: the logits would be wrong. {INSTEAD}"
        )
    if left:
        logger.warning(f"Not read of {file.path}: {', '.join(f'{name} = {value}' for name, value in left.items())}.")


def _unread(file: GGUFFile) -> Iterator[tuple[str, Any]]:
    """The numbers of the architecture that transformers has no field for."""
    prefix = f"{file.architecture}."
    read = GGUF_CONFIG_MAPPING.get(file.architecture.replace("-", "_"))
    if read is None:
        return
    for key, value in file.metadata.items():
        name = key.removeprefix(prefix)
        is_neutral = name in NEUTRAL and NEUTRAL[name] in (None, value)
        if key.startswith(prefix) and read.get(name) is None and not is_neutral:
            yield name, value


def _numbers(value: Any) -> Iterator[Any]:
    """All numbers and words in nested values; a float as its file holds it, in 32 bits."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, float):
        yield float(torch.tensor(value, dtype=torch.float32))
    else:
        yield value


def _head_dim(config: PreTrainedConfig) -> int | None:
    heads = getattr(config, "num_attention_heads", None)
    return getattr(config, "head_dim", None) or (heads and config.hidden_size // heads)


def _rotary_dim(config: PreTrainedConfig) -> int | None:
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor")
    share = share or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(share * (_head_dim(config) or 0))


def _set_llama3_scaling(file: GGUFFile, config: PreTrainedConfig) -> None:
    """Llama 3.1 and later: a file has the factors of the frequencies, and transformers the rule that they come from.

    Raises:
        MoEError: the factors are not those of the rule with the numbers that these models have.
    """
    factors = gguf_tensor(file, ROPE_FACTORS)
    if bool((factors == 1).all()):
        return
    rule = {"rope_type": "llama3", "factor": float(factors.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    plain = dict(config.rope_parameters)
    config.rope_parameters = plain | rule | {"original_max_position_embeddings": 8192}
    exponents = torch.arange(0, 2 * len(factors), 2, dtype=torch.float32) / (2 * len(factors))
    expected = plain["rope_theta"] ** -exponents / factors
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    if scaled.shape != expected.shape or not torch.allclose(scaled, expected, rtol=1e-4, atol=0):
        raise MoEError(
            f"{file.path} scales its rotary frequencies ({ROPE_FACTORS}) in a way that transformers does not read: the "
            f"logits would be wrong. {INSTEAD}"
        )


def check_all_tensors_read(file: GGUFFile, model: PreTrainedModel, unexpected: set[str]) -> None:
    """Refuse a model that lacks a tensor of its file.

    Args:
        model (`PreTrainedModel`): as transformers loaded it.
        unexpected (`set[str]`): the names that its loading report had no place for.

    Raises:
        MoEError: naming them.
    """
    if file.architecture in TENSOR_PROCESSORS or file.architecture in GGUF_CONFIG_MAPPING:
        processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=model.config.to_dict())
        unexpected = unexpected | file.shapes.keys() - get_gguf_hf_weights_map(model, processor).keys()
    lost = sorted(unexpected - {ROPE_FACTORS})
    if lost:
        raise MoEError(
            f"{file.path} has {len(lost)} tensors that transformers has no place for in {type(model).__name__}, such as "
            f"{lost[0]}: the model would not be the file's. {INSTEAD}"
        )


def complete_generation_config(file: GGUFFile, generation: GenerationConfig) -> None:
    """All tokens that end an answer, and how its makers sample."""
    ends = list(dict.fromkeys(file.metadata[key] for key in _keys(ENDS) if file.metadata.get(key) is not None))
    if len(ends) > 1:
        generation.eos_token_id = ends
    sampling = {field: file.metadata.get(f"general.sampling.{name}") for name, field in SAMPLING.items()}
    for field, value in sampling.items():
        if value is not None:
            generation.do_sample = True
            setattr(generation, field, value)


def _keys(names: tuple[str, ...]) -> Iterator[str]:
    return (f"tokenizer.ggml.{name}" for name in names)


def complete_tokenizer(file: GGUFFile, tokenizer: PreTrainedTokenizerBase) -> None:
    """Cut text as the vocabulary was learned where that is known, else say so; keep all templates."""
    rule = file.metadata.get("tokenizer.ggml.pre")
    if file.metadata.get("tokenizer.ggml.model") == "gpt2" and rule is not None:
        if rule in DIGIT_SPLITS:
            parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
        elif rule not in GPT2_SPLITS and _cuts_like_gpt2(tokenizer):
            logger.warning(
                f"{file.path} cuts text by the rule {rule!r} before it becomes tokens, which transformers does not know: the "
                "tokenizer cuts as GPT-2's does, and some texts get other ids. Take the tokenizer from the model that the "
                "file was made from if you can."
            )
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): text for key, text in file.metadata.items() if key.startswith(prefix)}
    if named:
        tokenizer.chat_template = {"default": tokenizer.chat_template} | named if tokenizer.chat_template else named


def _cuts_like_gpt2(tokenizer: PreTrainedTokenizerBase) -> bool:
    return isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
