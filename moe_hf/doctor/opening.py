"""What was given, opened: a folder, a Hub id, a GGUF file or a model becomes named tensors and blocks of experts."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedConfig, PreTrainedModel

from moe_hf.dense_sources import quantization_settings
from moe_hf.doctor.empty_model import empty_model
from moe_hf.doctor.gguf_tensors import GGUFTensors, blocks_of_gguf
from moe_hf.doctor.layout import Layout, is_of_experts, layout_of
from moe_hf.doctor.pieces import Block
from moe_hf.doctor.quantized_tensors import CODES_8, QuantizedTensors, split_name
from moe_hf.doctor.tensors import ModelTensors, Tensors
from moe_hf.errors import MoEError
from moe_hf.gguf_files import gguf_file_of
from moe_hf.inference import load_low_memory
from moe_hf.inspection import load_config
from moe_hf.unwrapping import unwrapped
from moe_hf.weight_checks import refuse_more_than_there_is
from moe_hf.weight_files import CheckpointReader


# What of a repository is looked at.
PATTERNS = ("*.json", "*.safetensors", "*.gguf", "*.jinja", "*.model", "tokenizer*")


@dataclass
class Opened:
    """Something with experts, or a dense base, that can be read piece by piece.

    Attributes:
        name: as the user called it.
        tensors: by name in the file.
        blocks: the layers with experts.
        config: of the model; None for a GGUF file.
        layout: where each tensor goes; None for a GGUF file.
        folder: where it lies, or None for a model in memory.
    """

    name: str
    tensors: Tensors
    blocks: list[Block]
    config: PreTrainedConfig | None
    layout: Layout | None
    folder: Path | None = None

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, on the meta device unless it was given in memory."""
        return None if self.layout is None else self.layout.model

    def close(self) -> None:
        """Close its files."""
        if isinstance(self.tensors, CheckpointReader | QuantizedTensors):
            self.tensors.close()


def local_path(what: str | os.PathLike) -> Path:
    """The folder or the file of what was given; a Hub id is fetched.

    Raises:
        MoEError: neither is there.
    """
    path = Path(what).expanduser()
    if path.exists():
        return path
    if str(what).startswith((".", "/", "~")) or str(what).count("/") > 1 or path.suffix == ".gguf":
        raise MoEError(f"{what} does not exist: give a folder, a GGUF file or a Hub id.")
    try:
        return Path(snapshot_download(str(what), allow_patterns=list(PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MoEError(f"{what} is neither a path here nor fetched from the Hub: {reason}") from error


def open_folder(path: Path, name: str) -> Opened:
    """Open a checkpoint folder.

    Raises:
        MoEError: its configuration or its files cannot be read, or no class is known for it.
    """
    config = load_config(str(path))
    reader = CheckpointReader(path)
    refuse_more_than_there_is(path, config, reader.tensors)
    tensors: Tensors = reader
    if quantization_settings(config) is not None or not _is_plain(reader):
        tensors = QuantizedTensors(reader)
    layout = layout_of(empty_model(config, path), tensors.tensors)
    return Opened(name, tensors, layout.blocks, config, layout, path)


def _is_plain(reader: CheckpointReader) -> bool:
    """Whether no tensor is stored in codes: by its dtype, or by the name of a part that only codes have."""
    specs = reader.tensors
    return not any(is_of_experts(n) and (specs[n].dtype in CODES_8 or split_name(n)[1]) for n in specs)


def open_low_memory(path: Path, name: str) -> Opened:
    """Open a folder of `save_low_memory`; its experts stay in their file, and are decoded one at a time.

    Raises:
        MoEError: the folder is damaged.
    """
    model = load_low_memory(path, resident_per_layer=1)
    opened = open_model(model, name)
    return Opened(name, opened.tensors, opened.blocks, model.config, opened.layout, path)


def open_gguf(path: Path, name: str) -> Opened:
    """Open a GGUF file.

    Raises:
        MoEError: it is damaged, or the package gguf is missing.
    """
    tensors = GGUFTensors(path)
    return Opened(name, tensors, blocks_of_gguf(tensors), None, None, path)


def open_model(model: Any, name: str | None = None) -> Opened:
    """Open a model in memory.

    Raises:
        MoEError: it is no model of transformers.
    """
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise MoEError(f"{type(model).__name__} is no model of transformers: give one, or its folder.")
    tensors = ModelTensors(model)
    layout = layout_of(model, tensors.tensors)
    return Opened(name or model.name_or_path or type(model).__name__, tensors, layout.blocks, model.config, layout)


def open_base(base: Any) -> Opened:
    """Open what something is compared with.

    Raises:
        MoEError: it cannot be read.
    """
    if not isinstance(base, str | os.PathLike):
        return open_model(base)
    path = local_path(base)
    if gguf_file_of(path) is not None:
        return open_gguf(gguf_file_of(path), str(base))
    return open_folder(path, str(base))
