"""`export_native` and `import_native`: a checkpoint folder into another, tensor by tensor, from file to file.

The numbers are copied between the files by the kernel, so memory does not grow with the model.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.interchange.configs import check_importable, choose_target, moe_config, native_config, warnings_for
from moe_hf.interchange.families import FAMILIES
from moe_hf.interchange.plan import Plan, Span, inverse, make_exchange
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.saving import atomic_folder
from moe_hf.unwrapping import path_of
from moe_hf.weight_files import CheckpointReader, TensorSpec
from moe_hf.weight_writer import FileWriter, StoredBytes, file_layouts, write_index


logger = logging.get_logger(__name__)

# Of a checkpoint folder, what says nothing of the form of the weights.
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "spiece.model",
    "sentencepiece*",
)


def export_native(
    source_dir: str | os.PathLike,
    output_dir: str | os.PathLike,
    target: str = "auto",
    *,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write one of our checkpoints as a native MoE of transformers, which servers read and which needs no code of ours.

    Tensor names, shapes and config are those that transformers' own `save_pretrained` writes for the family. Numbers are
    copied, not computed: the model is the same, or the export is refused.

    Args:
        source_dir (`str` or `os.PathLike`): a folder with a moe_hf checkpoint in safetensors files.
        output_dir (`str` or `os.PathLike`): must not exist.
        target (`str`): a family of `moe_hf.interchange.exact_targets`, or `"auto"`, the first exact one.
        max_shard_size (`int` or `str`): bytes of tensors in one file.

    Returns:
        `pathlib.Path` of the folder.

    Raises:
        MoEError: the source is no such checkpoint, the family cannot hold it exactly (with the reason), or the output
            exists; nothing is left behind.

    Example:
        ```python
        moe_hf.export_native("my-moe", "my-mixtral")
        AutoModelForCausalLM.from_pretrained("my-mixtral")
        ```
    """
    config, source = moe_config_of(source_dir), Path(source_dir)
    target = choose_target(config, target)
    native = native_config(config, target)
    checksums: dict[str, dict[str, str]] = {}
    with CheckpointReader(source) as reader, atomic_folder(output_dir, checksums) as folder:
        exchange = make_exchange(config, native, FAMILIES[target])
        _check_names(reader, exchange.our_tensors)
        native.architectures = [type(exchange.native).__name__]
        native.save_pretrained(folder)
        _tell_older_readers(folder / "config.json")
        _copy_small_files(source, folder)
        checksums |= _write(folder, exchange.plan, exchange.native_tensors, reader, max_shard_size)
    for text in warnings_for(config, target):
        logger.warning(f"{output_dir}: {text}.")
    return Path(output_dir)


def import_native(
    source_dir: str | os.PathLike, output_dir: str | os.PathLike, *, max_shard_size: int | str = "5GB"
) -> Path:
    """Write a native MoE checkpoint of transformers as one of ours: the dense family that it came from, and our blocks.

    Lossless, or refused: `export_native` of the result gives the same tensors and fields.

    Args:
        source_dir (`str` or `os.PathLike`): a folder as `save_pretrained` writes it, in safetensors files.
        output_dir (`str` or `os.PathLike`): must not exist.
        max_shard_size (`int` or `str`): bytes of tensors in one file.

    Returns:
        `pathlib.Path` of the folder, which `moe_hf.MoEForCausalLM.from_pretrained` loads.

    Raises:
        MoEError: the family has no dense twin, our model has no place for something of it, or the output exists;
            nothing is left behind.
    """
    source = _folder(source_dir)
    native = _config(source)
    if isinstance(native, MoEConfig):
        raise MoEError(f"{source} is a moe_hf model already.")
    check_importable(native.model_type)
    family = FAMILIES[native.model_type]
    checksums: dict[str, dict[str, str]] = {}
    with CheckpointReader(source) as reader, atomic_folder(output_dir, checksums) as folder:
        names = family.names
        zero_shared = _are_zero(reader, *(names.shared or ()), names.shared_gate)
        config = moe_config(native, zero_shared=zero_shared, zero_bias=_are_zero(reader, names.correction_bias))
        exchange = make_exchange(config, native, family)
        _check_names(reader, exchange.native_tensors)
        for name in (name for name, spans in exchange.plan.items() if not spans):
            if bool(reader.read(name).any()):
                raise MoEError(f"{name} of {source} is not zero, and our model has no place for it.")
        # The config and the code that defines the model, as each saved model has them; the numbers follow.
        exchange.ours.save_pretrained(folder, state_dict={})
        _copy_small_files(source, folder)
        checksums |= _write(folder, inverse(exchange.plan), exchange.our_tensors, reader, max_shard_size)
    return Path(output_dir)


def moe_config_of(folder: str | os.PathLike) -> MoEConfig:
    """The config of one of our checkpoint folders.

    Raises:
        MoEError: it is no folder, or holds another kind of model.
    """
    config = _config(_folder(folder))
    if not isinstance(config, MoEConfig):
        what = "a native MoE already" if config.model_type in FAMILIES else "no moe_hf model: upcycle it first"
        raise MoEError(f"{folder} holds a {config.model_type}, which is {what}.")
    return config


def _folder(path: str | os.PathLike) -> Path:
    folder = Path(path_of(path, "save the model with save_pretrained first"))
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is no folder"
        raise MoEError(f"{folder} {what}: give a local folder with a checkpoint.")
    return folder


def _config(folder: Path) -> PreTrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise MoEError(f"{folder}/config.json cannot be read: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise MoEError(f"{folder} is quantised; give the checkpoint that it was made from.")
    return config


def _check_names(reader: CheckpointReader, expected: dict[str, TensorSpec]) -> None:
    """Refuse a source whose tensors are not those that its config tells."""
    missing, more = sorted(expected.keys() - reader.tensors.keys()), sorted(reader.tensors.keys() - expected.keys())
    if missing or more:
        raise MoEError(
            f"The tensors of {reader.folder} are not those of its config: {len(missing)} are missing {missing[:3]}, "
            f"{len(more)} are not known {more[:3]}. Write the model again with save_pretrained."
        )
    for name, spec in expected.items():
        if reader.tensors[name].shape != spec.shape:
            raise MoEError(
                f"{name} of {reader.folder} is {reader.tensors[name].shape}, its config tells {spec.shape}."
            )


def _are_zero(reader: CheckpointReader, *names: str | None) -> bool:
    """Whether the tensors of these names, in all layers, are all zeros."""
    ends = tuple(f".{name}" for name in names if name is not None)
    return not any(bool(reader.read(name).any()) for name in reader.tensors if ends and name.endswith(ends))


def _tell_older_readers(config_file: Path) -> None:
    """Say the rotation where it was said before `rope_parameters`: who looks there would take defaults without a word."""
    fields = json.loads(config_file.read_text(encoding="utf-8"))
    rope = dict(fields["rope_parameters"])
    fields["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        fields["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope["rope_type"] != "default":
        fields["rope_scaling"] = rope
    config_file.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_small_files(source: Path, folder: Path) -> None:
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def _write(
    folder: Path, plan: Plan, tensors: dict[str, TensorSpec], reader: CheckpointReader, max_shard_size: int | str
) -> dict[str, dict[str, str]]:
    """Write each tensor as the plan says: spans of the source, or zeros, in the source's dtypes; returns checksums."""
    specs = {name: TensorSpec(_dtype(name, plan[name], spec, reader), spec.shape) for name, spec in tensors.items()}
    layouts = file_layouts(specs, max_shard_size)
    checksums = {}
    for layout in layouts:
        with FileWriter(folder, layout) as file:
            for name, spec in layout.tensors.items():
                reached, size, stored = 0, spec.dtype.itemsize, []
                for span in plan[name]:
                    descriptor, position = reader.place(span.source)
                    num_bytes = span.count * size
                    stored.append(StoredBytes([(name, reached)], num_bytes, descriptor, position + span.start * size))
                    reached += num_bytes
                if stored:
                    file.copy(*stored)
                else:
                    file.write(name, torch.zeros(spec.shape, dtype=spec.dtype))
        checksums[layout.name] = file.checksum
    write_index(folder, layouts)
    return checksums


def _dtype(name: str, spans: list[Span], spec: TensorSpec, reader: CheckpointReader) -> torch.dtype:
    dtypes = {reader.tensors[span.source].dtype for span in spans}
    if len(dtypes) > 1:
        raise MoEError(f"{name} would be made of tensors of several dtypes: {sorted(map(str, dtypes))}.")
    if dtypes:
        return dtypes.pop()
    # A bias for choosing experts stays in float32 whatever the model's dtype, as transformers loads it.
    return torch.float32 if name.endswith("_bias") else spec.dtype
