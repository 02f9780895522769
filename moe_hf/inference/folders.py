"""A model with quantized or apart experts as a folder, and loaded without ever holding the experts as plain numbers.

    FOLDER/config.json, generation_config.json, the tokenizer's files
    FOLDER/low_memory.json             format_version, class, scheme, and for each weight of experts its shape, dtype, layout
    FOLDER/weights/model.safetensors   all tensors; an experts' weight NAME as NAME.codes, NAME.scales, ... (E, ...), or as
                                       NAME where it is not quantized
    FOLDER/moe_hf_manifest.json        sizes and checksums

There is no `model.safetensors` beside the config, so that `from_pretrained` refuses the folder instead of drawing experts at
random.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.errors import MoEError
from moe_hf.inference.expert_cache import PLAIN, CachedMatrices, DiskBacking, HostBacking
from moe_hf.inference.offload import WEIGHTS_FOLDER, check_residents, tensor_names
from moe_hf.inference.quantize import QuantizedMatrices, expert_modules, set_stored
from moe_hf.inference.schemes import QuantizationScheme
from moe_hf.inspection import config_errors, load_config
from moe_hf.kernels import StoredExperts, describe_experts, leave_to_each_process
from moe_hf.modeling import modeling_moe
from moe_hf.saving import atomic_folder, refuse_existing, verify_manifest
from moe_hf.unwrapping import path_of, whole_model
from moe_hf.weight_checks import refuse_more_than_there_is
from moe_hf.weight_files import WEIGHTS_NAME, CheckpointReader, TensorSpec


FACTS_NAME = "low_memory.json"
FORMAT_VERSION = 1
FLOAT_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class WeightFacts:
    """What the folder says of one weight of experts: its matrices (E, O, I), (E, I, O) in the module when `swapped`."""

    shape: tuple[int, int, int]
    dtype: torch.dtype
    swapped: bool
    scheme: QuantizationScheme | None

    @property
    def part_specs(self) -> dict[str, TensorSpec]:
        """What a file must have of it."""
        experts, *matrix = self.shape
        parts = {PLAIN: (self.dtype, tuple(matrix))} if self.scheme is None else self.scheme.part_shapes(tuple(matrix))
        return {part: TensorSpec(dtype, (experts, *shape)) for part, (dtype, shape) in parts.items()}

    @property
    def shape_in_module(self) -> tuple[int, ...]:
        """The shape of the parameter."""
        experts, rows, columns = self.shape
        return (experts, columns, rows) if self.swapped else self.shape


def save_low_memory(
    model: PreTrainedModel, folder: str | os.PathLike, tokenizer: PreTrainedTokenizerBase | None = None
) -> Path:
    """Save a model, quantized or not, as a folder for `load_low_memory`; the folder is whole or absent.

    Args:
        folder (`str` or `os.PathLike`): must not exist.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): saved along.

    Returns:
        `pathlib.Path` of the folder.

    Raises:
        MoEError: the folder exists, or the model's experts have adapters, are offloaded, or cannot be stored.
    """
    refuse_existing(folder)
    model = whole_model(model, "A low-memory folder")
    facts: dict[str, Any] = {"format_version": FORMAT_VERSION, "class": type(model).__name__, "experts": {}}
    tensors, names, taken = {}, {id(module): name for name, module in model.named_modules()}, set()
    for experts in expert_modules(model).values():
        description = describe_experts(experts)
        for name in (description.first, description.second):
            weight, full = getattr(experts, name), f"{names[id(experts)]}.{name}"
            source = weight.source if isinstance(weight, StoredExperts) else None
            if isinstance(source, CachedMatrices):
                raise MoEError("Offloaded experts are not saved: save the model before offload_experts.")
            parts = {PLAIN: weight.detach()} if source is None else source.parts
            tensors |= {tensor_names(full, parts)[part]: value for part, value in parts.items()}
            taken.add(full)
            facts["experts"][full] = {
                "shape": list(weight.shape if source is None else source.shape),
                "dtype": str(weight.dtype).removeprefix("torch."),
                "swapped": source is not None and weight.swapped,
                "scheme": None if source is None else asdict(source.scheme),
            }
    tensors |= {name: value for name, value in model.state_dict().items() if name not in taken}
    with atomic_folder(folder) as temporary:
        model.config.save_pretrained(temporary)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        (temporary / WEIGHTS_FOLDER).mkdir()
        # Tied tensors are written under each of their names.
        save_file(_apart(tensors), temporary / WEIGHTS_FOLDER / WEIGHTS_NAME, metadata={"format": "pt"})
        (temporary / FACTS_NAME).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    seen, result = set(), {}
    for name, tensor in tensors.items():
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        result[name] = tensor.detach().clone() if place in seen else tensor.detach().contiguous()
        seen.add(place)
    return result


@torch.no_grad()
def load_low_memory(
    folder: str | os.PathLike,
    *,
    resident_per_layer: int | None = None,
    from_disk: bool = True,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load what `save_low_memory` wrote, in eval mode; no expert is ever there as plain numbers if it is quantized.

    Args:
        folder (`str` or `os.PathLike`): the folder.
        resident_per_layer (`int`, *optional*): offload the experts, see `offload_experts`; all are on `device` by default.
        from_disk (`bool`): offloaded experts stay in the folder's file; else they are in host memory.
        device (`str` or `torch.device`): where the model computes.

    Raises:
        MoEError: the folder is not of this kind, is damaged, or has a format of a later version.
    """
    folder, device = Path(path_of(folder, "save it with save_low_memory first")), torch.device(device)
    if resident_per_layer is not None:
        check_residents(resident_per_layer)
    class_name, weights = _facts(folder)
    reader = CheckpointReader(folder / WEIGHTS_FOLDER)
    model = _empty_model(folder, class_name, reader.tensors)
    owners, taken = dict(model.named_modules()), set()
    for full, fact in weights.items():
        owner, _, name = full.rpartition(".")
        own = getattr(owners.get(owner), name, None)
        if not isinstance(own, nn.Parameter) or tuple(own.shape) != fact.shape_in_module:
            raise MoEError(
                f"{folder} has experts {full!r} {fact.shape}, which do not fit {class_name}: it is damaged."
            )
        names = tensor_names(full, fact.part_specs)
        for part, spec in fact.part_specs.items():
            if reader.tensors.get(names[part]) != spec:
                raise MoEError(f"{reader.folder} has no {names[part]} of {spec.dtype} {spec.shape}: it is damaged.")
        if fact.scheme is None and resident_per_layer is None:
            continue  # a tensor like the rest
        taken.update(names.values())
        if resident_per_layer is not None and from_disk:
            backing = DiskBacking(reader, names)
        else:
            values = {part: reader.read(tensor) for part, tensor in names.items()}
            backing = None if resident_per_layer is None else HostBacking(values, device)
        if backing is not None:
            source = CachedMatrices(backing, fact.scheme, fact.shape, fact.dtype, device, resident_per_layer)
        else:
            source = QuantizedMatrices(
                fact.scheme, {part: value.to(device) for part, value in values.items()}, fact.shape, fact.dtype
            )
        set_stored(owners[owner], name, StoredExperts(source, fact.swapped))
    _load_rest(model, reader, taken, device)
    leave_to_each_process(model)
    return model.eval()


def _facts(folder: Path) -> tuple[str, dict[str, WeightFacts]]:
    verify_manifest(folder, sizes_only=True)
    file = folder / FACTS_NAME
    if not file.is_file():
        raise MoEError(f"{folder} has no {FACTS_NAME}: save_low_memory did not write it. Use from_pretrained.")
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        version = facts["format_version"]
        experts = {name: _weight_facts(fact) for name, fact in facts["experts"].items()}
        class_name = str(facts["class"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MoEError(f"{file} is damaged ({error!r}): use another copy of the folder.") from error
    if version != FORMAT_VERSION:
        raise MoEError(f"{file} has format_version {version!r}, this moe_hf reads {FORMAT_VERSION}: update it.")
    return class_name, experts


def _weight_facts(fact: dict[str, Any]) -> WeightFacts:
    shape = tuple(fact["shape"])
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"shape {shape}")
    if fact["dtype"] not in FLOAT_DTYPES:
        raise ValueError(f"dtype {fact['dtype']}")
    scheme = None if fact["scheme"] is None else QuantizationScheme(**fact["scheme"])
    return WeightFacts(shape, getattr(torch, fact["dtype"]), bool(fact["swapped"]), scheme)


def _empty_model(folder: Path, class_name: str, tensors: Mapping[str, TensorSpec]) -> PreTrainedModel:
    config = load_config(str(folder))
    refuse_more_than_there_is(folder, config, tensors)
    owner = modeling_moe if hasattr(modeling_moe, class_name) else transformers
    cls = getattr(owner, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise MoEError(f"{folder} holds a {class_name}, which neither moe_hf nor transformers has.")
    # Buffers that no file has, such as the frequencies of positions, are computed as they always are.
    with config_errors(folder), init_empty_weights(include_buffers=False):
        model = cls._from_config(config) if owner is transformers else cls(config)
    if (folder / "generation_config.json").is_file() and model.can_generate():
        with config_errors(folder):
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def _load_rest(model: PreTrainedModel, reader: CheckpointReader, taken: set[str], device: torch.device) -> None:
    state = {name: reader.read(name) for name in reader.tensors if name not in taken}
    stored = {name for name, p in model.named_parameters() if not p.is_meta}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise MoEError(f"{reader.folder} does not fit the model: {' '.join(str(error).split())}") from error
    missing = [name for name in missing if name not in stored]
    if missing or unexpected:
        raise MoEError(f"{reader.folder} does not fit the model: missing {missing[:3]}, not known {unexpected[:3]}.")
    model.tie_weights()
    model.to(device)
