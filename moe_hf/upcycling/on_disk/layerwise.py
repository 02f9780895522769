"""Runs a causal LM whose weights stay on disk: each decoder layer is read when its forward begins, and freed after it.

Memory is that of the largest unit, not of the model. A unit is a decoder layer (a child of a `ModuleList`), or another
module with parameters of its own, such as the embedding or the head, which is read for its own forward alone.

transformers' `device_map="disk"` does this for checkpoints in the dtype that the model runs in; when a 16-bit one is
to run in float32, it casts all of it while loading, and holds as much memory as the whole file.
"""

import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from mmap import mmap
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.weight_files import CheckpointReader


# Of a tensor that is cast while it is read.
READ_BYTES = 4 << 20


def load_layerwise(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal LM for forward passes on the CPU, in evaluation mode, whose weights are read from `folder` as needed.

    Works for this package's checkpoints and for the decoders of transformers, with its renaming and fusing of tensors.
    Parameters are on the meta device outside of their unit's forward, and have no gradients; buffers are in memory. The
    files must not change while the model is in use.

    Args:
        folder (`str` or `Path`): a local folder with a config and safetensors files.
        dtype (`torch.dtype`, *optional*): to run in, such as `torch.float32` for a 16-bit checkpoint; the checkpoint's
            own if not given.

    Returns:
        `PreTrainedModel`; `model.layerwise.peak_bytes` is the most weight memory that was held at once, in bytes.

    Raises:
        MoEError: when the folder is not a whole checkpoint of a causal LM.
    """
    folder = Path(folder).expanduser()
    reader = CheckpointReader(folder)
    config = AutoConfig.from_pretrained(folder)
    config.name_or_path = str(folder)
    stored = (spec.dtype for spec in reader.tensors.values() if spec.dtype.is_floating_point)
    own = config.dtype or next(stored, torch.float32)
    dtype = dtype or own
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.requires_grad_(False)
    model.layerwise = LayerwiseWeights(model, reader, own, dtype)
    return model


class LayerwiseWeights:
    """Puts the tensors of a checkpoint into a model on the meta device, unit by unit, while it runs.

    Attributes:
        peak_bytes: the most bytes of parameters that were held at once.
    """

    def __init__(self, model: PreTrainedModel, reader: CheckpointReader, own: torch.dtype, dtype: torch.dtype):
        self.model, self.reader, self.own, self.dtype = model, reader, own, dtype
        # Of the modules that stay in float32 when the model is loaded in its own dtype.
        self._wide_names = tuple(model._get_dtype_plan(own))
        self.peak_bytes = self._held_bytes = 0
        mapping = get_model_conversion_mapping(model)
        self._load_config = LoadStateDictConfig(
            dtype=dtype, dtype_plan=model._get_dtype_plan(dtype), weight_mapping=mapping
        )
        self._sources = self._sources_by_name(mapping)
        self._read([name for name, _ in model.named_buffers() if name in self._sources])
        for path, module, whole in _units(model):
            names = [_join(path, name) for name, _ in module.named_parameters(recurse=whole)]
            self._check_stored(names)
            module.register_forward_pre_hook(lambda module, args, names=names: self.load(names))
            module.register_forward_hook(lambda module, args, output, names=names: self.free(names), always_call=True)
        weakref.finalize(model, reader.close)

    def _sources_by_name(self, mapping: list[WeightRenaming | WeightConverter]) -> dict[str, list[str]]:
        """Each tensor of the model to the names on disk that it is made from."""
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        targets = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
        state_dict, prefix = self.model.state_dict(), self.model.base_model_prefix
        sources = defaultdict(list)
        for stored in sorted(self.reader.tensors):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, state_dict)
            if name not in state_dict and stored in state_dict:
                name = stored
            # Of a conversion with several results, transformers names the first.
            first, *others = targets.get(pattern, [name])
            for target in (first, *others):
                sources[name.replace(first, target)].append(stored)
        return dict(sources)

    def _check_stored(self, names: list[str]) -> None:
        missing = [name for name in names if self._stored_name(name) is None]
        if missing:
            raise MoEError(
                f"{self.reader.folder} has no tensors for {missing[:4]} of {type(self.model).__name__}: the checkpoint is "
                "not complete, or is not one of this class."
            )

    def _stored_name(self, name: str) -> str | None:
        """`name`, or the one of the tied parameters that the checkpoint has in its place."""
        if name in self._sources:
            return name
        tied = self.model.all_tied_weights_keys
        first = tied.get(name, name)
        group = [first, *sorted(other for other, source in tied.items() if source == first)]
        return next((other for other in group if other in self._sources), None)

    def load(self, names: list[str]) -> None:
        """Read the parameters `names` of the model into memory."""
        self._read([name for name in names if name in self._sources])
        for name in names:
            if name not in self._sources:
                self._read_tied(name, self._stored_name(name))
        self._held_bytes += sum(self.model.get_parameter(name).nbytes for name in names)
        self.peak_bytes = max(self.peak_bytes, self._held_bytes)

    def free(self, names: list[str]) -> None:
        """Put the parameters `names` of the model back on the meta device."""
        for name in names:
            parameter = self.model.get_parameter(name)
            if not parameter.is_meta:
                self._held_bytes -= parameter.nbytes
                _set_parameter(self.model, name, parameter.to("meta"))

    def _read(self, names: list[str]) -> None:
        if not names:
            return
        stored = dict.fromkeys(stored for name in names for stored in self._sources[name])
        tensors = {name: self._tensor(name) for name in stored}
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            convert_and_load_state_dict_in_model(self.model, tensors, self._load_config)
        finally:
            if shown:
                logging.enable_progress_bar()
        loaded = self.model.state_dict()
        unfilled = [name for name in names if loaded[name].is_meta]
        if unfilled:
            stored = self._sources[unfilled[0]]
            raise MoEError(
                f"{self.reader.folder}: {unfilled[0]} {tuple(loaded[unfilled[0]].shape)} cannot be made from {stored[:4]} "
                f"{[self.reader.tensors[name].shape for name in stored[:4]]}: the config and the weights do not fit."
            )

    def _read_tied(self, name: str, stored: str) -> None:
        """Read a parameter that is stored under another one's name."""
        was_meta = self.model.get_parameter(stored).is_meta
        if was_meta:
            self._read([stored])
        tensor = self.model.get_parameter(stored).detach()
        _set_parameter(self.model, name, tensor)
        if was_meta:
            _set_parameter(self.model, stored, tensor.to("meta"))

    def _tensor(self, name: str) -> torch.Tensor:
        spec = self.reader.tensors[name]
        # Never to a narrower one: some modules stay in float32.
        dtype = torch.promote_types(spec.dtype, self.dtype) if spec.dtype.is_floating_point else spec.dtype
        tensor = _pages(spec.shape, dtype)
        loaded = self._loaded_dtype(name, spec.dtype)
        if dtype == loaded == spec.dtype:
            return self.reader.read(name, out=tensor)
        if not spec.shape:
            return tensor.copy_(self.reader.read(name).to(loaded))
        step = min(max(1, READ_BYTES // max(spec.row_bytes, 1)), spec.shape[0])
        narrow = _pages((step, *spec.shape[1:]), spec.dtype)
        for start in range(0, spec.shape[0], step):
            rows = narrow[: spec.shape[0] - start]
            rows = self.reader.read(name, start, start + len(rows), out=rows)
            tensor[start : start + step].copy_(rows.to(loaded))
        return tensor

    def _loaded_dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        """What a tensor is rounded to when the model is loaded in its own dtype, which may be less than is stored."""
        is_wider = stored.is_floating_point and torch.promote_types(stored, self.own) != self.own
        return self.own if is_wider and not any(part in name for part in self._wide_names) else stored


def _pages(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory pages of their own, which go back to the system with the tensor.

    The C library keeps much of what `torch.empty` frees, in pieces that the next layer does not fit into: with it, the
    peak was that of several layers.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(mmap(-1, count * dtype.itemsize), dtype=dtype).view(shape)


def _units(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """Path, module, and whether all below it belongs to the unit."""
    if next(module.parameters(recurse=False), None) is not None:
        yield path, module, False
    for name, child in module.named_children():
        if isinstance(module, nn.ModuleList):
            # Whole, since some layers read their children's weights without calling them.
            yield _join(path, name), child, True
        else:
            yield from _units(child, _join(path, name))


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, nn.Parameter(tensor, requires_grad=False))
