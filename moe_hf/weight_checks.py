"""Weights in files, before they are trusted: do they fit their configuration, and is every number finite?"""

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from moe_hf.checksums import safetensors_header
from moe_hf.errors import MoEError
from moe_hf.inspection import EXPERT_COUNT_NAMES, config_errors, load_config
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.extra_experts import EXTRA_EXPERTS
from moe_hf.modeling.modeling_moe import (
    MoEForCausalLM,
    MoEForSequenceClassification,
    MoEForTokenClassification,
    MoEModel,
)
from moe_hf.modeling.routers import ROUTERS
from moe_hf.saving import check_shard_index
from moe_hf.weight_files import DTYPES, CheckpointReader, TensorSpec


_PIECE_BYTES = 1 << 23
_NAMED = 3
_MODELS = (MoEModel, MoEForCausalLM, MoEForSequenceClassification, MoEForTokenClassification)


def check_finite_weights(folder: str | os.PathLike) -> None:
    """Refuse NaN and infinity in the safetensors files of a folder; 8 MiB are in memory at a time.

    Raises:
        `MoEError`: names the file and the first tensor.
    """
    for file in sorted(Path(folder).glob("**/*.safetensors")):
        start, facts = safetensors_header(file)
        with open(file, "rb") as stream:
            for name, fact in facts.items():
                dtype = DTYPES.get(fact["dtype"])
                if dtype is None or not (dtype.is_floating_point or dtype.is_complex):
                    continue
                begin, end = fact["data_offsets"]
                stream.seek(start + begin)
                if not _is_finite(stream, end - begin, dtype):
                    raise MoEError(
                        f"{file.name} holds NaN or infinity in {name!r}: the model computes nothing of use. Take an earlier "
                        "checkpoint of the run that wrote it."
                    )


def _is_finite(stream, size: int, dtype: torch.dtype) -> bool:
    while size > 0:
        piece = bytearray(stream.read(min(_PIECE_BYTES, size)))
        values = torch.frombuffer(piece, dtype=dtype) if piece else torch.empty(0)
        # Eight-bit floats have no isfinite of their own.
        values = values.float() if dtype.itemsize == 1 else values
        if not piece or not torch.isfinite(values).all():
            return False
        size -= len(piece)
    return True


def check_structure(folder: str | os.PathLike) -> None:
    """Check a checkpoint folder before memory is taken for it: its index, its headers, and names, shapes and dtypes.

    Names and shapes are compared for our models (routers and experts of one's own must be registered for that), whose files hold the tensors as they are in memory; transformers converts
    those of many other families while it loads, and compares them itself.

    Raises:
        `MoEError`: what `check_shard_index` refuses; a tensor that is missing, too many, twice, of another shape, or of whole
            numbers; a configuration that promises more than the files hold.
    """
    folder = Path(folder)
    config = load_config(str(folder))
    check_shard_index(folder)
    if not isinstance(config, MoEConfig) or getattr(config, "quantization_config", None):
        return
    with CheckpointReader(folder) as reader:
        tensors = reader.tensors
    refuse_more_than_there_is(folder, config, tensors)
    if config.router_type not in ROUTERS or set(config.extra_experts) - EXTRA_EXPERTS.keys():
        # What its parameters are only code that came along could tell, which is not run.
        return
    expected = _empty_model(folder, config).state_dict(keep_vars=True)
    groups: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        groups.setdefault(id(tensor), []).append(name)
    missing = [names[0] for names in groups.values() if not tensors.keys() & set(names)]
    _refuse(folder, "lacks", missing)
    _refuse(folder, "has, and its configuration does not know,", sorted(tensors.keys() - expected.keys()))
    for name, spec in tensors.items():
        if spec.shape != tuple(expected[name].shape):
            raise MoEError(
                f"{folder}: {name!r} has the shape {spec.shape}, its configuration tells {tuple(expected[name].shape)}. The "
                "configuration is of another checkpoint."
            )
        if expected[name].is_floating_point() and not spec.dtype.is_floating_point:
            raise MoEError(f"{folder}: {name!r} is stored as {spec.dtype}; weights are floating-point numbers.")


def _empty_model(folder: Path, config: MoEConfig) -> torch.nn.Module:
    """The model that was saved, on the meta device."""
    classes = {cls.__name__: cls for cls in _MODELS}
    names = config.architectures or ["MoEForCausalLM"]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in classes:
        raise MoEError(f"{folder}: its architecture is {name!r}; it must be one of {list(classes)}.")
    with config_errors(folder), torch.device("meta"):
        model = classes[name](config)
    model.tie_weights()
    return model


def refuse_more_than_there_is(folder: Path, config: PreTrainedConfig, tensors: Mapping[str, TensorSpec]) -> None:
    """Refuse a configuration that promises more layers or numbers than its files hold: an empty model of it takes forever.

    Raises:
        `MoEError`: names the field.
    """
    numbers = sum(math.prod(spec.shape) for spec in tensors.values())
    for name in ("num_hidden_layers", *EXPERT_COUNT_NAMES, "hidden_size", "vocab_size"):
        sizes = [getattr(part, name, None) for part in (config, config.get_text_config())]
        size = max((size for size in sizes if isinstance(size, int)), default=0)
        if size > (len(tensors) if name == "num_hidden_layers" else numbers):
            raise MoEError(
                f"{folder}: {name} is {size:,}, and the weights are {len(tensors):,} tensors of {numbers:,} numbers: the "
                "configuration is of another checkpoint."
            )


def _refuse(folder: Path, verb: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        raise MoEError(
            f"{folder} {verb} {', '.join(map(repr, names[:_NAMED]))}{more}: its weights and its configuration are of "
            "different checkpoints."
        )
