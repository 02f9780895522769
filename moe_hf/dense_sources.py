"""Dense models in whatever a user has: ordinary checkpoints, GGUF files, quantized checkpoints and models.

What is quantized becomes floating-point numbers, by transformers: `dequantize=True` of a quantization's settings, or
`model.dequantize()`. The numbers are those of the quantized weights, which is said and recorded; nothing of the quantizer
stays in the model. What transformers cannot undo is refused.
"""

import copy
import inspect
import io
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file, logging

from moe_hf.config_files import load_config
from moe_hf.errors import MoEError
from moe_hf.gguf_files import GGUFFile, gguf_config, gguf_file_of, read_gguf, reading_errors
from moe_hf.saving import read_json_object


logger = logging.get_logger(__name__)

# Beside a checkpoint that was converted: from what, and how its weights were stored.
SOURCE_RECORD = "moe_hf_source.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
# Names of tensors that only quantized checkpoints have.
QUANTIZED_NAMES = (
    "scale",
    "scales",
    "scale_inv",
    "qweight",
    "qzeros",
    "absmax",
    "quant_map",
    "SCB",
    "weight_packed",
    "blocks",
)
INSTEAD = "Give the checkpoint that it was made from (base_model on its card), in 16 or 32 bits."
# What transformers raises where a quantization's package or device is missing.
FAILURES = (ImportError, OSError, ValueError, RuntimeError, NotImplementedError, KeyError, AttributeError, TypeError)


def quantization_settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The settings of a quantization in a configuration, or None."""
    for part in (config, config.get_text_config(decoder=True)):
        settings = getattr(part, "quantization_config", None)
        if settings is not None:
            return dict(settings) if isinstance(settings, Mapping) else settings.to_dict()
    return None


def quantization_name(settings: Mapping[str, Any]) -> str:
    """Of a quantization, as transformers keys it: `gptq`, `fp8`, `bitsandbytes_4bit`."""
    method = settings.get("quant_method")
    name = str(getattr(method, "value", method) or "bitsandbytes")
    if name == "bitsandbytes":
        return f"{name}_{'8bit' if settings.get('load_in_8bit') else '4bit'}"
    return name


def check_dequantizable(config: PreTrainedConfig, name: str) -> None:
    """Refuse a quantization that transformers cannot undo; other configurations pass.

    Raises:
        MoEError: says what to give instead.
    """
    settings = quantization_settings(config)
    if settings is None:
        return
    method = quantization_name(settings)
    if not (_undone_while_loading(method) or _undone_after_loading(method)):
        raise MoEError(f"{name} is quantized by {method}, which transformers cannot undo. {INSTEAD}")


def without_quantization(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """The configuration of the model once it is dequantized; itself if it is not quantized.

    Raises:
        MoEError: see `check_dequantizable`.
    """
    if quantization_settings(config) is None:
        return config
    check_dequantizable(config, name)
    config = copy.deepcopy(config)
    for part in (config, config.get_text_config(decoder=True)):
        vars(part).pop("quantization_config", None)
    return config


def _undone_while_loading(method: str) -> bool:
    settings = AUTO_QUANTIZATION_CONFIG_MAPPING.get(method)
    return settings is not None and "dequantize" in inspect.signature(settings).parameters


def _undone_after_loading(method: str) -> bool:
    quantizer = AUTO_QUANTIZER_MAPPING.get(method)
    return quantizer is not None and quantizer._dequantize is not HfQuantizer._dequantize


def read_dense_config(source: str | os.PathLike) -> PreTrainedConfig:
    """The configuration of a source once it is in floating-point numbers.

    Raises:
        MoEError: there is none, or its quantization cannot be undone.
    """
    return without_quantization(load_config(str(source)), str(source))


def needs_conversion(source: str | os.PathLike) -> bool:
    """Whether the weights of a source are no floating-point numbers in safetensors: a GGUF file, or a quantized checkpoint.

    Raises:
        MoEError: it has no configuration that can be read.
    """
    return gguf_file_of(source) is not None or quantization_settings(load_config(str(source))) is not None


def quantized_as(source: str | os.PathLike) -> str | None:
    """How the weights of a source are quantized, for people to read; None where they are not."""
    file = gguf_file_of(source)
    if file is not None:
        return read_gguf(file).quantized_as
    record = Path(source).expanduser() / SOURCE_RECORD
    if record.is_file():
        return read_json_object(record).get("quantized_as")
    settings = quantization_settings(load_config(str(source)))
    return None if settings is None else quantization_name(settings)


def tell_quantized(name: str, how: str | None) -> None:
    """Say it where the weights of a source are quantized."""
    if how is not None:
        logger.warning(
            f"The weights of {name} are quantized ({how}): what is made from them has the quantized values, not those of "
            "the model before."
        )


def load_dense(source: str | os.PathLike, dtype: str | torch.dtype = "auto") -> tuple[PreTrainedModel, dict[str, Any]]:
    """A causal language model from a folder, a Hub id or a GGUF file, in floating-point numbers.

    Args:
        source (`str` or `os.PathLike`): where it is.
        dtype (`str` or `torch.dtype`): `"auto"` is the dtype of the configuration; of a GGUF file, the narrowest that holds
            each of its numbers: float32 for quantized ones.

    Returns:
        The model, of which no quantizer is left, and transformers' report on its loading.

    Raises:
        MoEError: it cannot be read, or its quantization cannot be undone here.
    """
    file = gguf_file_of(source)
    if file is not None:
        return _load_gguf(read_gguf(file), dtype)
    folder = Path(source).expanduser()
    name = str(folder if folder.is_dir() else source)
    settings = quantization_settings(load_config(name))
    if settings is None:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    return _load_quantized(name, settings, dtype)


def _load_gguf(file: GGUFFile, dtype: str | torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    from moe_hf.gguf_files.gaps import check_all_tensors_read, complete_generation_config

    config = gguf_config(file.path)
    settings = {}
    if hasattr(transformers, "GgufConfig"):
        # Or a kernel that is installed keeps some weights packed.
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with reading_errors(file), _bars():
        model, report = AutoModelForCausalLM.from_pretrained(
            file.path.parent,
            gguf_file=file.path.name,
            config=config,
            dtype=config.dtype if dtype == "auto" else dtype,
            output_loading_info=True,
            **settings,
        )
    _forget_quantizer(model)
    check_all_tensors_read(file, model, set(report["unexpected_keys"]))
    complete_generation_config(file, model.generation_config)
    model.name_or_path = str(file.path)
    return model, report


@contextmanager
def _bars() -> Iterator[None]:
    """transformers shows how far it is with a GGUF file whether progress bars are wanted or not."""
    with nullcontext() if logging.is_progress_bar_enabled() else redirect_stderr(io.StringIO()):
        yield


def _load_quantized(name: str, settings: dict[str, Any], dtype: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    config, method = load_config(name), quantization_name(settings)
    check_dequantizable(config, name)
    if _undone_while_loading(method):
        config.quantization_config = settings | {"dequantize": True}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, output_loading_info=True
        )
        if not _undone_while_loading(method):
            model = model.dequantize(dtype=model.dtype)
    except FAILURES as error:
        raise MoEError(
            f"{name} is quantized by {method}, and undoing that failed here: {_reason(error)}. {INSTEAD}"
        ) from error
    _forget_quantizer(model)
    return model, report


def _forget_quantizer(model: PreTrainedModel) -> None:
    """Take what is left of a quantizer off a model whose weights are floating-point numbers."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer.remove_quantization_config(model)
    # Or saving would quantize again, by the way back of what loading did.
    vars(model).pop("_weight_conversions", None)
    for part in (model.config, model.config.get_text_config(decoder=True)):
        vars(part).pop("quantization_config", None)


def plain_model(model: PreTrainedModel, name: str) -> tuple[PreTrainedModel, str | None]:
    """A model in memory without its quantizer, and how it was quantized; the model itself if it was not.

    The one that was given stays as it is. Of a GGUF file, weights are shared with it; of others they are copies.

    Raises:
        MoEError: its quantization cannot be undone, or transformers left something of its GGUF file out.
    """
    settings = quantization_settings(model.config)
    if settings is None:
        return model, _origin(model.name_or_path)
    method = quantization_name(settings)
    is_float = all(parameter.is_floating_point() for parameter in model.parameters())
    if is_float and (method == "gguf" or settings.get("dequantize")):
        plain = copy.copy(model)
        plain.config = copy.deepcopy(model.config)
        _forget_quantizer(plain)
        how = _of_gguf(plain, name, settings) if method == "gguf" else method
        tell_quantized(name, how)
        return plain, how
    if not _undone_after_loading(method):
        way = " Or load it with dequantize=True in its quantization_config." if _undone_while_loading(method) else ""
        raise MoEError(f"{name} is quantized by {method}, which cannot be undone in memory. {INSTEAD}{way}")
    try:
        plain = copy.deepcopy(model).dequantize(dtype=model.dtype)
    except FAILURES as error:
        raise MoEError(
            f"{name} is quantized by {method}, and undoing that failed here: {_reason(error)}. {INSTEAD}"
        ) from error
    _forget_quantizer(plain)
    tell_quantized(name, method)
    return plain, method


def _origin(name: str) -> str | None:
    """How the source on this machine that a plain model was loaded from is quantized."""
    path = Path(name).expanduser() if name else None
    if path is None or not (path.is_file() or (path / "config.json").is_file()):
        return None
    return quantized_as(path)


def _of_gguf(model: PreTrainedModel, name: str, settings: Mapping[str, Any]) -> str | None:
    """How the file that a model was loaded from was quantized, once nothing of it is missing in the model."""
    from moe_hf.gguf_files.gaps import check_all_tensors_read, complete_config

    try:
        path = cached_file(name, settings["gguf_file"], local_files_only=True)
        file = read_gguf(path)
    except (OSError, KeyError, TypeError, MoEError):
        logger.warning(
            f"The GGUF file of {name} was not found: whether transformers read all of it was not looked at."
        )
        return "GGUF"
    complete = copy.deepcopy(model.config)
    complete_config(file, complete)
    if complete.to_dict() != model.config.to_dict():
        raise MoEError(
            f"transformers left out of the configuration what {file.path} says: give the path of the file instead of a "
            "model that was loaded with gguf_file=."
        )
    check_all_tensors_read(file, model, set())
    model.name_or_path = str(file.path)
    return file.quantized_as


def find_dense_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """[`load_dense_tokenizer`], or None where a local folder has none."""
    folder = Path(source).expanduser()
    if (
        folder.is_dir()
        and gguf_file_of(folder) is None
        and not any((folder / name).exists() for name in TOKENIZER_FILES)
    ):
        return None
    return load_dense_tokenizer(source)


def load_dense_tokenizer(source: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, a Hub id or a GGUF file.

    Raises:
        OSError: there is none.
        MoEError: that of a GGUF file cannot be read.
    """
    path = gguf_file_of(source)
    if path is None:
        return AutoTokenizer.from_pretrained(source)
    from moe_hf.gguf_files.gaps import complete_tokenizer

    file = read_gguf(path)
    with reading_errors(file):
        # AutoTokenizer gives the same, and reads the whole vocabulary once more to find the configuration.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(file.path.parent, gguf_file=file.path.name)
    complete_tokenizer(file, tokenizer)
    return tokenizer


def refuse_quantized_names(names: Iterator[str] | set[str] | list[str], name: str) -> None:
    """Refuse a checkpoint without settings of a quantization whose unused tensors are those of a quantized one.

    Raises:
        MoEError: naming one of them.
    """
    found = sorted(one for one in names if one.rsplit(".", 1)[-1].endswith(QUANTIZED_NAMES))
    if found:
        raise MoEError(
            f"{name} holds quantized weights, such as {found[0]}, and its config.json has no quantization_config that says "
            f"how: they cannot be undone. {INSTEAD}"
        )


def _reason(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
