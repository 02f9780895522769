"""A dense causal LM in a folder: its model without numbers, and its numbers, read under the model's own names.

Letters: D model width, F width of the dense MLP.
"""

import copy
import hashlib
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from moe_hf.dense_sources import refuse_quantized_names
from moe_hf.errors import MoEError
from moe_hf.modeling.dense_mlp import MLPSite, activation_of, check_one_expert_reproduces, find_mlp_sites, holder_of
from moe_hf.upcycling.sources import check_dense_config, check_dense_model
from moe_hf.weight_files import CheckpointReader, TensorSpec, byte_view


logger = logging.get_logger(__name__)

IN_MEMORY = "Load it whole instead: moe_hf.upcycle(source), and save the result with moe_hf.hub.save_model."
# Of the narrow copies of an MLP on which it is checked that an expert reproduces it.
_CHECKED_WIDTH = 16


class NotStreamableError(MoEError):
    """The checkpoint can be upcycled in memory only."""


class DenseCheckpoint:
    """A dense checkpoint whose tensors are read one at a time, as `from_pretrained` would load them; a context manager.

    Args:
        folder (`str` or `Path`): a folder with a config and safetensors files.

    Attributes:
        model (`PreTrainedModel`): on the meta device.
        reader (`CheckpointReader`): of the files.

    Raises:
        MoEError: it is no dense model of transformers, its files are damaged, or their layout needs a conversion that
            only loading the whole model can do.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "config.json").is_file():
            raise MoEError(f"{folder} has no config.json: it is not a checkpoint that save_pretrained wrote.")
        config = AutoConfig.from_pretrained(self.folder)
        check_dense_config(config, str(folder))
        self.reader = CheckpointReader(self.folder)
        dtype = config.dtype or self._first_floating_dtype()
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        check_dense_model(self.model, str(folder))
        # Before the names are looked at, since it tells more clearly what is wrong with the source.
        find_mlp_sites(self.model.base_model)
        self.model.generation_config = _generation_config(self.folder)
        self._state = self.model.state_dict(keep_vars=True)
        plan = self.model._get_dtype_plan(self.model.dtype)
        self._wide_names, *_ = build_glob_alternation(list(plan)) if plan else (None,)
        found = self._names_on_disk()
        self._stored = {name: self._stored_name(name, found) for name in self._state}

    def __enter__(self) -> "DenseCheckpoint":
        return self

    def __exit__(self, *exception) -> None:
        self.reader.close()

    def _first_floating_dtype(self) -> torch.dtype:
        return next(
            (spec.dtype for spec in self.reader.tensors.values() if spec.dtype.is_floating_point), torch.float32
        )

    def _names_on_disk(self) -> dict[str, str]:
        """Each tensor of the model that is in the files, to its name there."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        prefix, found, unknown = self.model.base_model_prefix, {}, []
        for name in sorted(self.reader.tensors, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
            if target not in self._state and name in self._state:
                target, pattern = rename_source_key(name, [], [], prefix, self._state)
            if target not in self._state:
                unknown.append(name)
            elif pattern is not None or target in found:
                raise NotStreamableError(
                    f"{self.folder} stores {target} in another layout ({name}), which is converted while a model is loaded "
                    f"whole. {IN_MEMORY}"
                )
            else:
                found[target] = name
        refuse_quantized_names(unknown, str(self.folder))
        if unknown:
            logger.warning(
                f"Not used: {len(unknown)} tensors of {self.folder} that the model has no place for: {unknown[:4]}."
            )
        return found

    def _stored_name(self, name: str, found: dict[str, str]) -> str:
        """Where a tensor of the model is in the files: under its own name, or that of one that it is tied to."""
        tied = self.model.all_tied_weights_keys
        main = tied.get(name, name)
        stored = [found[alias] for alias in (main, name, *tied) if tied.get(alias, alias) == main and alias in found]
        if not stored:
            absent = f"{self.folder} has no tensor for {name}"
            if isinstance(self._state[name], nn.Parameter):
                raise MoEError(
                    f"{absent} of {type(self.model).__name__}, which would be random: give a whole checkpoint of a causal "
                    "language model."
                )
            raise NotStreamableError(f"{absent}, which is computed while a model is loaded whole. {IN_MEMORY}")
        if name in found and not self._equal(found[name], stored[0]):
            raise MoEError(
                f"The config of {self.folder} ties {name} to {main}, and both are stored with different values: set "
                "tie_word_embeddings to false in its config.json."
            )
        shape, expected = self.reader.tensors[stored[0]].shape, tuple(self._state[name].shape)
        if shape != expected:
            raise MoEError(f"{self.folder}: {stored[0]} is {shape}, and the config asks for {expected}.")
        return stored[0]

    def stored_name(self, name: str) -> str:
        """Where a tensor of the model is in the files."""
        return self._stored[name]

    def _equal(self, one: str, other: str) -> bool:
        return one == other or self._digest(one) == self._digest(other)

    def _digest(self, stored: str) -> bytes:
        spec, digest = self.reader.tensors[stored], hashlib.sha256()
        for start, stop in row_ranges(spec):
            digest.update(byte_view(self.reader.read(stored, start, stop)))
        return digest.digest()

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that `from_pretrained` gives a tensor of the model."""
        if self._wide_names is not None and self._wide_names.search(name):
            return torch.float32
        return self._state[name].dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Rows of a tensor of the model, as `from_pretrained` would load them."""
        return self.reader.read(self.stored_name(name), start, stop).to(self.dtype(name))

    def piece(self, site: MLPSite, piece: str) -> torch.Tensor:
        """One piece of the dense MLP at `site`, as `recipes.dense_pieces` gives it from memory."""
        place = self.piece_place(site, piece)
        if place is None:
            return torch.zeros(_rows(site, piece), dtype=self.dtype(self._name(site, "up", "weight")))
        name, start, stop, transposed = place
        if not transposed:
            return self.read(name, start, stop)
        tensor = self.read(name).t()
        return tensor[start:stop] if site.fused or not site.gated else tensor[start:stop].contiguous()

    def piece_place(self, site: MLPSite, piece: str) -> tuple[str, int, int, bool] | None:
        """The tensor of the model that holds a piece, the rows of it, and whether it is stored transposed.

        None for the bias of a projection that has none, which is zeros.
        """
        projection = getattr(holder_of(self.model.base_model, site), _projection(site, piece))
        if piece.endswith("_bias") and projection.bias is None:
            return None
        rows = _rows(site, piece)
        start = rows if site.fused and piece.startswith("up") else 0
        name = self._name(site, piece.removesuffix("_bias"), "bias" if piece.endswith("_bias") else "weight")
        return name, start, start + rows, isinstance(projection, Conv1D) and not piece.endswith("_bias")

    def _name(self, site: MLPSite, piece: str, kind: str) -> str:
        return f"{self._holder_name(site)}.{_projection(site, piece)}.{kind}"

    def _holder_name(self, site: MLPSite) -> str:
        path = f"{self.model.base_model_prefix}.{site.layer}"
        return f"{path}.{site.attribute}" if site.attribute else path

    def activation(self, site: MLPSite):
        """The activation of the MLP at `site`, with what it has learned."""
        activation = activation_of(holder_of(self.model.base_model, site), site)
        if not isinstance(activation, nn.Module):
            return activation
        activation = copy.deepcopy(activation)
        state = {
            name: self.read(f"{self._holder_name(site)}.{site.activation}.{name}") for name in activation.state_dict()
        }
        activation.load_state_dict(state, assign=True)
        return activation

    def check_mlp(self, site: MLPSite) -> None:
        """Refuse an MLP that computes more than an expert can, on a copy of it with a few random neurons.

        Raises:
            MoEError: see `check_one_expert_reproduces`.
        """
        if site.attribute is None:
            return
        holder = copy.deepcopy(holder_of(self.model.base_model, site))
        generator = torch.Generator().manual_seed(0)
        for name in filter(None, (site.gate, site.up, site.down)):
            setattr(holder, name, _narrow(getattr(holder, name), site, name == site.down, generator))
        if site.activation is not None and isinstance(activation := self.activation(site), nn.Module):
            setattr(holder, site.activation, activation.float())
        lost = [name for name, buffer in holder.named_buffers() if buffer.is_meta]
        if lost:
            raise NotStreamableError(
                f"{site.block} has tensors that are not stored in {self.folder}: {lost}. {IN_MEMORY}"
            )
        check_one_expert_reproduces(holder, replace(site, intermediate_size=_CHECKED_WIDTH))


def row_ranges(spec: TensorSpec, num_bytes: int = 4 << 20) -> list[tuple[int, int]]:
    """Ranges of rows of a tensor, each of about `num_bytes`."""
    rows = spec.shape[0] if spec.shape else 1
    step = max(1, num_bytes // max(1, spec.row_bytes))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        # As from_pretrained does: old folders keep these values in the model's config.
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def _projection(site: MLPSite, piece: str) -> str:
    kind = piece.removesuffix("_bias")
    return {"gate": site.gate or site.up, "up": site.up, "down": site.down}[kind]


def _rows(site: MLPSite, piece: str) -> int:
    return site.hidden_size if piece.startswith("down") else site.intermediate_size


def _narrow(projection: nn.Module, site: MLPSite, is_down: bool, generator: torch.Generator) -> nn.Module:
    """A projection of the same kind with `_CHECKED_WIDTH` random neurons, in float32."""
    width = _CHECKED_WIDTH * (2 if site.fused and not is_down else 1)
    inputs, outputs = (width, site.hidden_size) if is_down else (site.hidden_size, width)
    with torch.device("meta"):
        if isinstance(projection, Conv1D):
            narrow = Conv1D(outputs, inputs)
        else:
            narrow = nn.Linear(inputs, outputs, bias=projection.bias is not None)
    narrow = narrow.to(torch.float32).to_empty(device="cpu")
    for parameter in narrow.parameters():
        nn.init.normal_(parameter, std=inputs**-0.5, generator=generator)
    return narrow.requires_grad_(False)
