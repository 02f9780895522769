"""Adapters of experts in files: this package's own, small and exact, and those of PEFT.

PEFT's `target_parameters` have one rank and one scale for all experts: ranks are filled up with zeros, scales go into B, and
experts without an adapter are zeros.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.finetuning.base_record import base_record, check_base
from moe_hf.finetuning.expert_lora import (
    ExpertLora,
    add_expert_lora,
    chosen_experts,
    layer_of,
    lora_adapters,
    merge_expert_lora,
    remove_expert_lora,
    unmerge_expert_lora,
)
from moe_hf.finetuning.expert_selection import ExpertSelection
from moe_hf.finetuning.lora_config import ExpertLoraConfig
from moe_hf.finetuning.lora_sharding import local, whole
from moe_hf.finetuning.peft_files import PEFT_CONFIG, PEFT_WEIGHTS, RANK_MAJOR, from_peft, layout_of, to_peft
from moe_hf.saving import read_json_object, temporary_sibling
from moe_hf.unwrapping import unwrapped


logger = logging.get_logger(__name__)

LORA_NAME = "expert_lora.safetensors"
# What trains beside adapters, which `save_trained` writes beside them.
TRAINED_NAME = "trained_parameters.safetensors"
FORMAT = "moe_hf.expert_lora"
# What the header of weights in PEFT's layout says besides.
PEFT_FACTS = "moe_hf"
FORMATS = ("moe_hf", "peft")
Matrices = dict[str, torch.Tensor]


def save_expert_lora(model: nn.Module, folder: str | Path, *, file_format: str = "moe_hf") -> Path:
    """Write the adapters of `model` to `folder`; a collective call where the experts are sharded.

    Args:
        file_format (`str`): `"moe_hf"` writes `expert_lora.safetensors`: the adapters as they are in memory, of the chosen
            experts alone, and their config in the header. `"peft"` writes `adapter_config.json` and
            `adapter_model.safetensors` for `PeftModel.from_pretrained`, with the same logits.

    Returns:
        the folder. A file that exists is replaced at once, whole or not at all.

    Raises:
        MoEError: the model has no adapters; PEFT cannot hold them (DoRA); or the files cannot be written.
    """
    if file_format not in FORMATS:
        raise MoEError(f"file_format is {file_format!r}; it must be {' or '.join(FORMATS)}.")
    model = unwrapped(model)
    adapters = lora_adapters(model)
    if not adapters:
        raise MoEError(f"{type(model).__name__} has no adapters of experts: add_expert_lora(model, config) first.")
    config = next(iter(adapters.values())).config
    tensors = {f"{name}.{key}": value for name, a in adapters.items() for key, value in _gathered(a).items()}
    folder, base = Path(folder).expanduser(), _base_below(model, adapters)
    if file_format == "moe_hf":
        facts = {
            "config": config.to_dict(),
            "experts": {name: a.all_ids for name, a in adapters.items()},
            "base": base,
        }
        metadata = {"format": FORMAT, "version": "1", "facts": json.dumps(facts)}
        files: dict[str, Any] = {LORA_NAME: (tensors, metadata)}
    else:
        peft_config, peft_tensors = to_peft(model, config, adapters, tensors)
        # In the weights' header, which PEFT does not read: it warns of fields of its config that it does not know.
        metadata = {"format": "pt", PEFT_FACTS: json.dumps({"lora_B_layout": RANK_MAJOR, "base": base})}
        files = {PEFT_WEIGHTS: (peft_tensors, metadata), PEFT_CONFIG: peft_config}
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        write_files(folder, files)
    return folder


def load_expert_lora(
    model: nn.Module,
    folder: str | Path,
    *,
    allow_other_base: bool = False,
    lora_B_layout: str | None = None,
    with_others: bool = False,
) -> nn.Module:
    """Give `model` the adapters in `folder`, in place: those of `save_expert_lora`, or PEFT's with `target_parameters`.

    A model that has adapters already keeps them and gets the values, if they are of the same experts and ranks. Files of
    `save_expert_lora` say which weights they were trained on, whose fingerprint is compared; of others, and where experts are
    quantized or offloaded, what cannot be compared is warned of or left out.

    Args:
        allow_other_base (`bool`): put them onto a model that is not the one that they were trained on.
        lora_B_layout (`str`, *optional*): how PEFT's files hold the columns of an expert in `lora_B`: apart (`"rank_major"`,
            as PEFT does) or together (`"expert_major"`, as Unsloth did before September 2026). Files of Unsloth that do not
            say it need it.
        with_others (`bool`): the caller loads what `save_trained` has put beside the adapters; otherwise it is warned of.

    Returns:
        the same model, with all but the adapters frozen.

    Raises:
        MoEError: no adapters there, damaged files, ones that do not fit the model, or that were trained on another one; the
            model is then unchanged.
    """
    given, model = model, unwrapped(model)
    folder, ids, named = Path(folder).expanduser(), None, None
    if (folder / LORA_NAME).is_file():
        if lora_B_layout is not None:
            raise MoEError(f"lora_B_layout is for files of PEFT, and {folder / LORA_NAME} is none: leave it out.")
        config, tensors, ids, base = _read(folder / LORA_NAME)
    elif (folder / PEFT_CONFIG).is_file():
        config, tensors, base, named = _read_peft(model, folder, lora_B_layout)
    else:
        raise MoEError(f"{folder} has neither {LORA_NAME} nor {PEFT_CONFIG}.")
    _refuse_ranks_that_no_tensor_has(model, config, tensors, folder)
    had = bool(lora_adapters(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not had:
        add_expert_lora(given, config)
    try:
        targets = _targets(model, config, tensors, ids, folder)
        if not allow_other_base:
            check_base(model, base, folder, named)
    except MoEError:
        if not had:
            remove_expert_lora(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
        raise
    for here, rows in targets:
        here.data[: len(rows)].copy_(rows)
    if (folder / TRAINED_NAME).is_file() and not with_others:
        logger.warning(
            f"{folder} also holds what trained beside these adapters ({TRAINED_NAME}), which was not loaded: "
            "moe_hf.load_trained(model, folder) loads all of it."
        )
    return given


def _base_below(model: nn.Module, adapters: dict[str, ExpertLora]) -> dict[str, Any]:
    """The record of the model below the adapters, which are taken out of its weights for that time if they are merged."""
    merged = any(adapter.merged for adapter in adapters.values())
    if merged:
        unmerge_expert_lora(model)
    try:
        return base_record(model)
    finally:
        if merged:
            merge_expert_lora(model)


def _read_peft(
    model: nn.Module, folder: Path, lora_B_layout: str | None
) -> tuple[ExpertLoraConfig, Matrices, dict[str, Any] | None, str | None]:
    peft_config = read_json_object(folder / PEFT_CONFIG)
    try:
        with safe_open(folder / PEFT_WEIGHTS, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get(PEFT_FACTS, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            base, recorded = facts.get("base"), facts.get("lora_B_layout")
    except (OSError, SafetensorError, ValueError, AttributeError, RecursionError) as error:
        raise MoEError(f"{folder} cannot be read as adapters of PEFT: {error}.") from error
    config, tensors = from_peft(model, peft_config, tensors, layout_of(peft_config, recorded, lora_B_layout))
    return config, tensors, base, peft_config.get("base_model_name_or_path")


def _refuse_ranks_that_no_tensor_has(
    model: nn.Module, config: ExpertLoraConfig, tensors: Matrices, folder: Path
) -> None:
    """Before memory is taken: adapters are made first and filled afterwards."""
    chosen = chosen_experts(model, config)
    ranks = {config.rank_of(layer_of(block), expert) for block, experts in chosen.items() for expert in experts}
    largest = max((size for tensor in tensors.values() for size in tensor.shape), default=0)
    if max(ranks) > largest:
        raise MoEError(f"The adapters in {folder} are of rank {max(ranks)}, and their tensors are not: it is damaged.")


@torch.no_grad()
def _gathered(adapter: ExpertLora) -> Matrices:
    """The tensors of all processes, one row per expert of `all_ids`."""
    parts = adapter.placement.split(adapter.all_ids, adapter.num_experts)
    num_slots = max(map(len, parts))
    places = {expert: part * num_slots + slot for part, own in enumerate(parts) for slot, expert in enumerate(own)}
    order = [places[expert] for expert in adapter.all_ids]
    return {name: whole(p.detach())[order].cpu().contiguous() for name, p in adapter.named_parameters()}


def _targets(
    model: nn.Module, config: ExpertLoraConfig, tensors: Matrices, ids: dict[str, list[int]] | None, folder: Path
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The tensors of the model's adapters in this process, each with the rows that it gets."""
    adapters = lora_adapters(model)
    expected = {f"{name}.{key}" for name, adapter in adapters.items() for key, _ in adapter.named_parameters()}
    strange = sorted(expected ^ tensors.keys())
    given, own = (c.to_dict() for c in (config, next(iter(adapters.values())).config))
    # What the values do not depend on; the experts show in the tensors.
    given, own = ({key: v for key, v in c.items() if key not in ("dropout", "seed", "experts")} for c in (given, own))
    same_experts = ids is None or ids == {name: list(adapter.all_ids) for name, adapter in adapters.items()}
    if strange or given != own or not same_experts:
        what = f" ({strange[0]})" if strange else ""
        raise MoEError(f"The adapters in {folder} are of another config than the model's{what}.")
    targets = []
    for name, adapter in adapters.items():
        for key, parameter in adapter.named_parameters():
            values, here = tensors[f"{name}.{key}"], local(parameter)
            if len(values) != len(adapter.all_ids) or values.shape[1:] != here.shape[1:]:
                raise MoEError(
                    f"{name}.{key} in {folder} has the shape {tuple(values.shape)}; the model's adapters of "
                    f"{len(adapter.all_ids)} experts have {tuple(here.shape[1:])} each."
                )
            targets.append((here, values[[adapter.all_ids.index(expert) for expert in adapter.ids]]))
    return targets


def write_files(folder: Path, files: dict[str, Any]) -> None:
    """Write files by name, each whole or not at all: tensors with their metadata as a pair, anything else as JSON.

    Raises:
        MoEError: one cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = temporary_sibling(folder / name)
            try:
                if isinstance(content, tuple):
                    save_file(content[0], temporary, metadata=content[1])
                else:
                    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
                os.replace(temporary, folder / name)
            finally:
                temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise MoEError(f"{folder} cannot be written: {error}.") from error


def _read(path: Path) -> tuple[ExpertLoraConfig, Matrices, dict[str, list[int]], dict[str, Any] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise MoEError(f"{path} holds no adapters of save_expert_lora.")
            facts = json.loads(metadata["facts"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            config, experts = facts["config"], ExpertSelection.load(facts["experts"]).experts
            base = facts.get("base")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, MoEError):
            raise
        raise MoEError(f"{path} cannot be read as adapters: {error!r}.") from error
    if isinstance(config, dict) and isinstance(config.get("experts"), str):
        raise MoEError(f"{path} says that its experts are in the file {config['experts']!r}: it is damaged.")
    return ExpertLoraConfig.from_dict(config), tensors, {name: list(ids) for name, ids in experts.items()}, base
