"""Files of what trains alone: written by checkpoints, and by hand where `save_pretrained` would lose something.

Each part of what trains has the form that its readers know: chosen experts `expert_deltas.safetensors`, adapters of experts
`expert_lora.safetensors`, adapters of PEFT that train alone PEFT's own files. Everything else has its name in the model:
`trained_parameters.safetensors`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_deltas import DELTAS_NAME, load_expert_deltas, save_expert_deltas
from moe_hf.finetuning.expert_lora import CHILD as LORA_CHILD
from moe_hf.finetuning.expert_lora import lora_adapters
from moe_hf.finetuning.lora_files import LORA_NAME, TRAINED_NAME, load_expert_lora, save_expert_lora, write_files
from moe_hf.finetuning.lora_sharding import is_sharded, whole
from moe_hf.finetuning.moe_blocks import whole_shape
from moe_hf.finetuning.peft_files import PEFT_CONFIG, PEFT_WEIGHTS
from moe_hf.finetuning.peft_files import PREFIX as PEFT_PREFIX
from moe_hf.finetuning.selected_experts import selected_modules
from moe_hf.finetuning.trained_tensors import (
    has_peft,
    inner_model,
    lost_names,
    named_tensors,
    names_in_peft_files,
    trained_tensors,
)
from moe_hf.unwrapping import is_peft_model, unwrapped


FORMAT = "moe_hf.trained_parameters"
WHAT = {
    DELTAS_NAME: "the scope selected, chosen experts with parameters of their own",
    LORA_NAME: "adapters of experts",
    PEFT_CONFIG: "adapters of PEFT alone",
    TRAINED_NAME: "other parameters beside these",
}


@dataclass(frozen=True)
class TrainedParts:
    """Which files hold what trains in a model: `names` of the files, and what the one of all others holds, by name."""

    names: frozenset[str]
    others: Mapping[str, torch.Tensor] = field(repr=False)


def trained_parts(model: nn.Module) -> TrainedParts:
    """How `save_trained` divides what trains in `model`; the same in every process."""
    inner, left, names = inner_model(model), trained_tensors(model), set()
    if selected_modules(inner):
        # They hold what trains beside the chosen experts too.
        names.add(DELTAS_NAME)
        own = named_tensors(inner)
        left = {name: tensor for name, tensor in left.items() if name not in own}
    if any(not adapter.merged for adapter in lora_adapters(inner).values()):
        names.add(LORA_NAME)
        left = {name: tensor for name, tensor in left.items() if f".experts.{LORA_CHILD}." not in name}
    if is_peft_model(model) and not names and not is_sharded(model):
        written = {name for entries in names_in_peft_files(model).values() for name in entries.values()}
        if left.keys() <= written:
            return TrainedParts(frozenset({PEFT_CONFIG}), {})
    return TrainedParts(frozenset(names | ({TRAINED_NAME} if left else set())), left)


def holds_trained(folder: str | Path) -> bool:
    """Whether `folder` has files of `save_trained`."""
    return any((Path(folder) / name).is_file() for name in WHAT)


def save_trained(model: nn.Module, folder: str | Path) -> Path:
    """Write all that trains in `model` to `folder`, whatever it is and however it came to train; nothing of the frozen rest.

    Adapters are written also while they are frozen, and correction biases of routers that train. A collective call where the
    model is sharded. Files that exist are replaced one by one, each whole or not at all.

    Returns:
        the folder.

    Raises:
        MoEError: nothing trains in the model, or the files cannot be written.
    """
    model, folder = unwrapped(model, keep_peft=True), Path(folder).expanduser()
    parts, inner = trained_parts(model), inner_model(model)
    if not parts.names:
        raise MoEError(f"Nothing trains in {type(inner).__name__}: choose a scope, or save the whole model.")
    is_main = not distributed.is_initialized() or distributed.get_rank() == 0
    if DELTAS_NAME in parts.names and is_main:
        save_expert_deltas(inner, folder / DELTAS_NAME)
    if LORA_NAME in parts.names:
        save_expert_lora(inner, folder)
    if PEFT_CONFIG in parts.names and is_main:
        type(model).save_pretrained(model, folder)
    if TRAINED_NAME in parts.names:
        tensors = {name: whole(tensor.detach()).cpu().contiguous() for name, tensor in parts.others.items()}
        trains = [name for name, tensor in parts.others.items() if tensor.requires_grad]
        if is_main:
            metadata = {"format": FORMAT, "version": "1", "trains": json.dumps(trains)}
            write_files(folder, {TRAINED_NAME: (tensors, metadata)})
    return folder


def load_trained(model: nn.Module, folder: str | Path) -> nn.Module:
    """Bring what `save_trained` wrote back into a model of the same base, in place, bit by bit.

    Adapters of experts are added where the model has none. Adapters of PEFT, and modules that were added by hand, must be there:
    add them first, as they were. What trained then trains afterwards, and nothing else.

    Returns:
        the same model.

    Raises:
        MoEError: no such files, damaged ones, or ones that do not fit the model.
    """
    given, model, folder = model, unwrapped(model, keep_peft=True), Path(folder).expanduser()
    inner = inner_model(model)
    if not holds_trained(folder):
        raise MoEError(f"{folder} has none of {', '.join(WHAT)}: it was not written by save_trained.")
    others, trains = _read(folder / TRAINED_NAME) if (folder / TRAINED_NAME).is_file() else ({}, [])
    _refuse_missing_adapters(model, folder, others)
    if (folder / DELTAS_NAME).is_file():
        load_expert_deltas(inner, folder)
    if (folder / LORA_NAME).is_file():
        load_expert_lora(inner, folder, with_others=True)
    if (folder / PEFT_CONFIG).is_file():
        _load_peft(model, folder)
    if others:
        _fill(model, others, folder / TRAINED_NAME)
        kept = {name for name in trained_tensors(model) if f".experts.{LORA_CHILD}." in name}
        for name, parameter in named_tensors(model).items():
            if isinstance(parameter, nn.Parameter) and name not in kept:
                parameter.requires_grad_(name in trains)
    return given


def refuse_other_parts(model: nn.Module, folder: str | Path) -> None:
    """Refuse a run's files that hold something else than what trains in `model` now.

    Raises:
        MoEError: it says what is there and not here, or here and not there.
    """
    parts, folder = trained_parts(model), Path(folder)
    found = frozenset(name for name in WHAT if (folder / name).is_file())
    if not found and not needs_parts(model):
        return
    expected = parts.names if needs_parts(model) else frozenset()
    for name in [*expected - found, *found - expected]:
        raise MoEError(
            f"{folder} is of a run {'without' if name in expected else 'with'} {WHAT[name]}. Resume as it was: with the same "
            "scope, the same adapters, the same parameters freed."
        )
    if TRAINED_NAME in found:
        there = _read(folder / TRAINED_NAME)[0].keys()
        for name in sorted(there ^ parts.others.keys()):
            raise MoEError(
                f"{name} {'trained' if name in there else 'did not train'} in the run of {folder}, and now it "
                f"{'does not' if name in there else 'does'}. Free the same parameters."
            )


def _refuse_missing_adapters(model: nn.Module, folder: Path, others: Mapping[str, torch.Tensor]) -> None:
    if (folder / PEFT_CONFIG).is_file() and not is_peft_model(model):
        raise MoEError(
            f"{folder} has adapters of PEFT: load them with PeftModel.from_pretrained(model, {str(folder)!r})."
        )
    own = named_tensors(model)
    for name, values in others.items():
        if name not in own:
            raise MoEError(
                f"{folder} holds {name}, which {type(inner_model(model)).__name__} has not. Give the model the same adapters "
                "and modules first (get_peft_model with the same configuration, the same new head), then load."
            )
        if whole_shape(own[name]) != values.shape:
            raise MoEError(
                f"{name} has the shape {tuple(values.shape)} in {folder}, and {tuple(whole_shape(own[name]))} in the model."
            )


@torch.no_grad()
def _load_peft(model: nn.Module, folder: Path) -> None:
    own, targets = named_tensors(model), []
    for adapter, entries in names_in_peft_files(model).items():
        file = (folder if adapter == "default" else folder / adapter) / PEFT_WEIGHTS
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise MoEError(f"{file} cannot be read as adapters of PEFT: {error}.") from error
        # Embeddings that have adapters stand there too, frozen.
        surplus = {e for e in tensors.keys() - entries.keys() if e.removeprefix(PEFT_PREFIX) not in own}
        strange = sorted(surplus | (entries.keys() - tensors.keys()))
        strange += [e for e in entries if e in tensors and tensors[e].shape != own[entries[e]].shape]
        if strange:
            raise MoEError(f"The adapters in {file} are not the model's: they differ in {strange[0]}.")
        targets += [(own[name], tensors[entry]) for entry, name in entries.items()]
    for target, values in targets:
        target.data.copy_(values)


@torch.no_grad()
def _fill(model: nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    own = named_tensors(model)
    for name, values in tensors.items():
        target = own[name].detach()
        if isinstance(target, DTensor):
            # Every process has read the whole file.
            values = distribute_tensor(
                values.to(target.device, target.dtype), target.device_mesh, target.placements, src_data_rank=None
            )
            target.to_local().copy_(values.to_local())
        else:
            target.copy_(values)


def needs_parts(model: nn.Module) -> bool:
    """Whether a checkpoint of `model` holds what trains alone: `save_pretrained` would lose some, or write all for little."""
    inner = inner_model(model)
    return bool(has_peft(model) or selected_modules(inner) or lora_adapters(inner) or lost_names(model))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise MoEError(f"{path} was not written by save_trained.")
            trains = json.loads(metadata["trains"])
            if not isinstance(trains, list):
                raise ValueError("names of what trains are no list")
            return {name: file.get_tensor(name) for name in file.keys()}, trains  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, MoEError):
            raise
        raise MoEError(f"{path} cannot be read: {error!r}.") from error
