"""Which parameters train: a scope names a part of the model, everything else is frozen.

Works on every model whose MoE blocks have a child `experts` with parameters of three dimensions (E first), which are
this package's models and transformers' own (Mixtral, Qwen3-MoE, OLMoE, GLM4-MoE, ...).
"""

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_selection import ExpertSelection
from moe_hf.finetuning.moe_blocks import find_moe_blocks, return_to_shards, whole_shape
from moe_hf.finetuning.save_guard import guard_saving
from moe_hf.finetuning.selected_experts import (
    merge_selected_experts,
    selected_parameter_names,
    split_selected_experts,
)
from moe_hf.modeling.dense_mlp import MLP_ATTRIBUTES, PROJECTIONS
from moe_hf.unwrapping import unwrapped


logger = logging.get_logger(__name__)

SCOPES = {
    "moe": "routed experts, shared experts and router of each MoE block",
    "experts": "weights of the routed experts",
    "selected": "chosen experts of each layer, in parameters of their own",
    "router": "routers",
    "shared": "shared experts and their gates",
    "non_moe": "everything outside the MoE blocks",
    "attention": "attention layers",
    "ffn": "all MLPs, dense ones and MoE blocks",
    "all": "everything",
}
PROJECTION_NAMES = {name for row in PROJECTIONS for name in row if name is not None}


@dataclass(frozen=True)
class ScopeReport:
    """What trains after `apply_scope`: counts in parameters, sizes in bytes as stored, names of parameters.

    A chosen expert counts once in `total_parameters`, though its frozen row stays in memory beside the one that trains.
    `mlp_layers` are those whose dense MLPs counted as experts.
    """

    scope: str
    trainable_parameters: int
    total_parameters: int
    trainable_bytes: int
    names: tuple[str, ...] = field(repr=False)
    mlp_layers: tuple[int, ...] = ()

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / self.total_parameters
        layers = f", MLPs of layers {', '.join(map(str, self.mlp_layers))} as experts" if self.mlp_layers else ""
        return (
            f"scope {self.scope}{layers}: {self.trainable_parameters:,} of {self.total_parameters:,} parameters train "
            f"({share:.1f} %, {self.trainable_bytes / 2**20:,.1f} MiB)"
        )


def apply_scope(
    model: nn.Module,
    scope: str = "moe",
    *,
    master_dtype: torch.dtype | None = torch.float32,
    expert_selection: ExpertSelection | Mapping[str, Any] | str | Path | None = None,
    mlp_layers: Collection[int] | None = None,
) -> ScopeReport:
    """Freeze `model` outside `scope` and make the parameters in it trainable.

    Args:
        scope (`str`): one of `SCOPES`. With `selected` the chosen experts get parameters of their own, which are part of the
            state dict in their old places; any other scope afterwards puts them back.
        master_dtype (`torch.dtype`, *optional*): dtype that trained parameters are converted to, in place. An AdamW step
            at a learning rate of 1e-5 is lost in bf16's 8 bits, so fp32; train with autocast (`bf16=True`) when the
            frozen rest stays in bf16. `None` leaves dtypes alone.
        expert_selection (`ExpertSelection`, `dict` or `str`, *optional*): for the scope `selected`: the chosen experts, as
            an object, as `{layer: [ids]}`, or as the path of a JSON file of `select_experts`.
        mlp_layers (`Collection[int]`, *optional*): layers whose dense MLPs count as experts, so that the scope of a MoE fits
            the dense model that it is compared with.

    Raises:
        MoEError: an unknown scope, or one that matches no parameter; a selection that does not fit; a model that is
            wrapped in DistributedDataParallel, which has decided which gradients it waits for; the model is then
            unchanged.
    """
    given, model = model, unwrapped(model, changes_parameters=True)
    _check_scope(scope)
    if (scope == "selected") != (expert_selection is not None):
        raise MoEError(
            "The scope 'selected' needs expert_selection, which experts: a JSON file of `moe-hf select-experts`, or "
            f"{{layer: [ids]}}; other scopes take none. Given: scope {scope!r}, expert_selection {expert_selection!r}."
        )
    return_to_shards(model)
    adapters = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" in name]
    if scope == "selected":
        selection = ExpertSelection.load(expert_selection)
        # Names that do not match are found before anything is changed.
        others = _other_names(model, selection)
        wanted = set(split_selected_experts(model, selection, master_dtype)) | others
        names = tuple(name for name, _ in model.named_parameters() if name in wanted)
    else:
        scope_parameter_names(model, scope, mlp_layers)
        merge_selected_experts(model)
        names = scope_parameter_names(model, scope, mlp_layers)
        wanted = set(names)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted and master_dtype is not None and parameter.dtype != master_dtype:
            parameter.data = parameter.data.to(master_dtype)
    if not all(parameter.requires_grad for parameter in adapters):
        logger.warning(
            f"Adapters that trained are outside the scope {scope!r} and are frozen now, as they are. To train them too, free "
            "them by hand afterwards; to train them alone, choose no scope."
        )
    guard_saving(given)
    return report_scope(model, scope, mlp_layers)


def report_scope(model: nn.Module, scope: str, mlp_layers: Collection[int] | None = None) -> ScopeReport:
    """Say what of `model` trains now, under the name `scope`."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    twice = set(selected_parameter_names(model))
    return ScopeReport(
        scope=scope,
        trainable_parameters=sum(whole_shape(p).numel() for p in trained.values()),
        total_parameters=sum(whole_shape(p).numel() for name, p in model.named_parameters() if name not in twice),
        trainable_bytes=sum(whole_shape(p).numel() * p.element_size() for p in trained.values()),
        names=tuple(trained),
        mlp_layers=tuple(sorted(mlp_layers or ())),
    )


def _other_names(model: nn.Module, selection: ExpertSelection) -> set[str]:
    """What trains beside the chosen experts."""
    names = set()
    for wanted, scope in ((selection.shared_experts, "shared"), (selection.non_expert_modules, "non_moe")):
        names |= set(scope_parameter_names(model, scope)) if wanted else set()
    return names


def _check_scope(scope: str) -> None:
    if scope not in SCOPES:
        nearest = difflib.get_close_matches(str(scope), SCOPES, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise MoEError(f"Unknown scope {scope!r}; scopes are {', '.join(SCOPES)}.{hint}")


def scope_parameter_names(model: nn.Module, scope: str, mlp_layers: Collection[int] | None = None) -> tuple[str, ...]:
    """Return the names of the parameters in `scope`, in the model's order; tied parameters appear once.

    Those of `selected` are there after `apply_scope` only.

    Args:
        mlp_layers (`Collection[int]`, *optional*): layers whose dense MLPs count as experts.

    Raises:
        MoEError: an unknown scope, one that matches no parameter, or a layer without a dense MLP.
    """
    _check_scope(scope)
    parts = _parameter_parts(model)
    if mlp_layers:
        parts |= dict.fromkeys(_mlps_of_layers(model, parts, mlp_layers), "experts")
    if scope == "moe":
        chosen = {name for name, part in parts.items() if part in ("experts", "router", "shared", "moe")}
    elif scope == "non_moe":
        chosen = {name for name, part in parts.items() if part == "dense"}
    elif scope == "attention":
        chosen = {name for name, part in parts.items() if part == "dense" and _is_attention(name)}
    elif scope == "ffn":
        chosen = {name for name, part in parts.items() if part != "dense" or _is_dense_mlp(name)}
    elif scope == "selected":
        chosen = set(selected_parameter_names(model))
    elif scope == "all":
        chosen = set(parts)
    else:
        chosen = {name for name, part in parts.items() if part == scope}
    if not chosen:
        blocks = len(find_moe_blocks(model))
        has = f"its {blocks} MoE blocks have none" if blocks else "it has no MoE block"
        raise MoEError(
            f"The scope {scope!r} ({SCOPES[scope]}) matches no parameter of {type(model).__name__}: {has}. "
            "Upcycle a dense model first, or choose another scope."
        )
    return tuple(name for name in parts if name in chosen)


def _parameter_parts(model: nn.Module) -> dict[str, str]:
    """Map each parameter name to `experts`, `router`, `shared`, `moe` (the rest of a block) or `dense`."""
    blocks = sorted(find_moe_blocks(model), key=len, reverse=True)
    return {name: _part(name, blocks) for name, _ in model.named_parameters()}


def _mlps_of_layers(model: nn.Module, parts: dict[str, str], layers: Collection[int]) -> list[str]:
    """The parameters of the dense MLPs in some layers."""
    mlps = {name: layer_of(name) for name, part in parts.items() if part == "dense" and _is_dense_mlp(name)}
    missing = sorted(set(layers) - set(mlps.values()), key=str)
    if missing:
        known = sorted(layer for layer in set(mlps.values()) if layer is not None)
        raise MoEError(
            f"{type(model).__name__} has no dense MLP in layer {missing[0]}; it has them in "
            f"{', '.join(map(str, known)) or 'none'}. Name these in mlp_layers, by number."
        )
    return [name for name, layer in mlps.items() if layer in layers]


def layer_of(name: str) -> int | None:
    """The number of the layer that a module or parameter is in, or None outside of the layers."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def _part(name: str, blocks: list[str]) -> str:
    block = next((block for block in blocks if not block or name.startswith(f"{block}.")), None)
    if block is None:
        return "dense"
    child = name[len(block) + 1 if block else 0 :].split(".")[0]
    if child == "experts":
        return "experts"
    if child.startswith("shared"):
        return "shared"
    if child in ("gate", "router"):
        return "router"
    # A decoder layer (an element of a list, named by a number) that holds `experts` itself has attention and norms too.
    return "dense" if block.split(".")[-1].isdigit() else "moe"


def _is_attention(name: str) -> bool:
    return any(re.search("attn|attention", part) and "norm" not in part for part in name.split(".")[:-1])


def _is_dense_mlp(name: str) -> bool:
    modules = name.split(".")[:-1]
    if _is_attention(name):
        return False
    return any(part in MLP_ATTRIBUTES for part in modules) or modules[-1] in PROJECTION_NAMES
