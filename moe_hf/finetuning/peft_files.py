"""The layout of PEFT's LoRA on `target_parameters`, both ways.

PEFT stacks the experts of a weight (E, O, I) in `lora_A` (E * r, I), an expert's rows together, and in `lora_B` (O, r * E),
an expert's columns E apart ("rank-major"). Where several weights of a module have adapters it nests them: the first in the
module's order is the innermost, under one `base_layer` for each that follows.

Files of others differ from that in two ways. Unsloth before September 2026 put an expert's columns of `lora_B` together
("expert-major"), in files that look the same (https://github.com/unslothai/unsloth/issues/6930). And PEFT up to 0.19.0 took some
weights for (E, I, O), so that `lora_A` holds what belongs to the outputs (https://github.com/unslothai/unsloth/issues/5410): up to
0.18 those that are (E, O, I), in 0.19.0 all.
"""

import json
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_lora import ExpertLora, layer_of
from moe_hf.finetuning.lora_config import TARGETS, ExpertLoraConfig
from moe_hf.finetuning.moe_blocks import experts_in, find_moe_blocks


PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
RANK_MAJOR, EXPERT_MAJOR = "rank_major", "expert_major"
LAYOUTS = (RANK_MAJOR, EXPERT_MAJOR)
# What Unsloth writes into adapter_config.json, from September 2026 on.
LAYOUT_FIELD, LAYOUTS_OF_UNSLOTH = "lora_B_layout", {"rank_major": RANK_MAJOR, "grouped_by_expert": EXPERT_MAJOR}
# The first PEFT with the layout that is written here.
WRITTEN_VERSION = "0.19.1"
Matrices = dict[str, torch.Tensor]


def to_peft(
    model: nn.Module, config: ExpertLoraConfig, adapters: dict[str, ExpertLora], tensors: Matrices
) -> tuple[dict[str, Any], Matrices]:
    """PEFT's config and tensors for adapters whose `tensors` are named `{block}.{map}_{A or B}`.

    Raises:
        MoEError: the adapters are DoRA, which PEFT does not have for stacked weights.
    """
    if config.use_dora:
        raise MoEError("PEFT has no DoRA for stacked weights of experts. Save with file_format='moe_hf'.")
    blocks = find_moe_blocks(model)
    rank = max(tensor.shape[1] for name, tensor in tensors.items() if name.endswith("_A"))
    common = config.scale_of(rank)
    targets, result = set(), {}
    names = next(iter(adapters.values())).targets
    for block, module in blocks.items():
        experts, num_experts = module.experts, experts_in(module.experts)
        for name in names:
            adapter = adapters.get(block)
            outputs, inputs = sizes(experts, name)
            down, up = torch.zeros(num_experts, rank, inputs), torch.zeros(num_experts, rank, outputs)
            for row, expert in enumerate(adapter.all_ids if adapter else ()):
                own = config.rank_of(layer_of(block), expert)
                down[expert, :own] = tensors[f"{block}.{name}_A"][row, :own]
                up[expert, :own] = tensors[f"{block}.{name}_B"][row, :own] * (config.scale_of(own) / common)
            where = _key(block, experts, name, names)
            result[f"{where}.lora_A.weight"] = down.reshape(-1, inputs)
            result[f"{where}.lora_B.weight"] = up.permute(2, 1, 0).reshape(outputs, -1).contiguous()
            targets.add(f"{_tail(block)}experts.{name}")
    peft_config = {
        "peft_type": "LORA",
        "peft_version": WRITTEN_VERSION,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model.config, "_name_or_path", "") or None,
        "r": rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "use_rslora": config.use_rslora,
        "target_modules": [],
        "target_parameters": sorted(targets),
        "bias": "none",
        "inference_mode": True,
    }
    return peft_config, result


def from_peft(
    model: nn.Module, peft_config: dict[str, Any], tensors: Matrices, layout: str
) -> tuple[ExpertLoraConfig, Matrices]:
    """The inverse: a config, and tensors named `{block}.{map}_{A or B}`, of all experts.

    Args:
        layout (`str`): how `lora_B` is packed, of `LAYOUTS`.

    Raises:
        MoEError: the files are not of `target_parameters` on experts alone, or do not fit the model.
    """
    targets = peft_config.get("target_parameters")
    # PEFT itself takes a list; a pattern as one text names parameters that only it can find.
    targets = targets if isinstance(targets, list) else []
    names = tuple(name for name in TARGETS if any(str(target).rpartition(".")[2] == name for target in targets))
    several = peft_config.get("rank_pattern") or peft_config.get("alpha_pattern") or peft_config.get("use_dora")
    if peft_config.get("peft_type") != "LORA" or not names or several:
        raise MoEError(
            "The files of PEFT are no LoRA on target_parameters of experts with one rank and scale. Load them with "
            "PeftModel."
        )
    config = ExpertLoraConfig(
        r=peft_config.get("r"),
        alpha=peft_config.get("lora_alpha"),
        use_rslora=bool(peft_config.get("use_rslora")),
        target=names,
    )
    left, result = dict(tensors), {}
    for block, module in find_moe_blocks(model).items():
        num_experts = experts_in(module.experts)
        for name in names:
            where = _key(block, module.experts, name, names)
            outputs, inputs = sizes(module.experts, name)
            try:
                first, second = left.pop(f"{where}.lora_A.weight"), left.pop(f"{where}.lora_B.weight")
                swapped = _is_swapped(first, outputs, inputs, module.experts.is_transposed, peft_config)
                rows, columns = (outputs, inputs) if swapped else (inputs, outputs)
                first = first.reshape(num_experts, config.r, rows)
                if layout == RANK_MAJOR:
                    second = second.reshape(columns, config.r, num_experts).permute(2, 1, 0)
                else:
                    second = second.reshape(columns, num_experts, config.r).permute(1, 2, 0)
            except (KeyError, RuntimeError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise MoEError(f"The files of PEFT do not fit {block}.experts.{name}: {reason}.") from error
            down, up = (second, first) if swapped else (first, second)
            result[f"{block}.{name}_A"], result[f"{block}.{name}_B"] = down.contiguous(), up.contiguous()
    if left:
        raise MoEError(f"The files of PEFT also have {min(left)}, which is no expert. Load them with PeftModel.")
    return config, result


def layout_of(peft_config: dict[str, Any], recorded: str | None, given: str | None) -> str:
    """How `lora_B` is packed.

    Args:
        recorded (`str`, *optional*): what the weights' file says, if it is one of ours.
        given (`str`, *optional*): what the user says.

    Raises:
        MoEError: files of Unsloth, or of nobody knows whom, do not say it, and the user does not either; or both say
            something else.
    """
    if given is not None and given not in LAYOUTS:
        raise MoEError(f"lora_B_layout is {given!r}; it must be one of {list(LAYOUTS)}.")
    if LAYOUT_FIELD in peft_config:
        field = peft_config[LAYOUT_FIELD]
        if not isinstance(field, str) or field not in LAYOUTS_OF_UNSLOTH:
            raise MoEError(f"{LAYOUT_FIELD} in {PEFT_CONFIG} is {field!r}; {list(LAYOUTS_OF_UNSLOTH)} are known.")
        recorded = LAYOUTS_OF_UNSLOTH[field]
    if recorded is not None:
        if recorded not in LAYOUTS:
            raise MoEError(
                f"The files say that lora_B is {recorded!r}, which is none of {list(LAYOUTS)}: they are damaged."
            )
        if given not in (None, recorded):
            raise MoEError(f"The files say that lora_B is {recorded}, and lora_B_layout is {given!r}: leave it out.")
        return recorded
    # With one rank both are the same.
    of_unsloth = "unsloth" in json.dumps(peft_config).lower()
    if given is None and peft_config.get("r") != 1 and (of_unsloth or not peft_config.get("peft_version")):
        writer = "names Unsloth" if of_unsloth else "names no peft_version"
        raise MoEError(
            f"{PEFT_CONFIG} {writer} and does not say how lora_B is packed, which changed in Unsloth in September 2026: pass "
            'lora_B_layout="expert_major" if an earlier Unsloth trained the adapters, "rank_major" if a later one or PEFT did.'
        )
    return given or RANK_MAJOR


def _is_swapped(
    first: torch.Tensor, outputs: int, inputs: int, is_transposed: bool, peft_config: dict[str, Any]
) -> bool:
    """Whether `lora_A` holds the outputs' side: seen from its width, or where that cannot tell from PEFT's version."""
    if outputs != inputs:
        return first.shape[-1] == outputs
    try:
        version = Version(str(peft_config.get("peft_version")).partition("@")[0])
    except InvalidVersion as error:
        raise MoEError(
            f"{PEFT_CONFIG} has no peft_version, and experts of {inputs} inputs and outputs were stored in another order up "
            'to PEFT 0.19.0: add "peft_version", that of the PEFT that wrote the file.'
        ) from error
    if version >= Version(WRITTEN_VERSION):
        return False
    return version >= Version("0.19.0") or not is_transposed


def sizes(experts: nn.Module, name: str) -> tuple[int, int]:
    """(outputs, inputs) of the map `name`."""
    outputs, inputs = getattr(experts, name).shape[1:]
    return (inputs, outputs) if experts.is_transposed else (outputs, inputs)


def _key(block: str, experts: nn.Module, name: str, names: tuple[str, ...]) -> str:
    order = [own for own, _ in experts.named_parameters(recurse=False) if own in names]
    return PREFIX + f"{block}.experts" + ".base_layer" * (len(order) - 1 - order.index(name))


def _tail(block: str) -> str:
    """The name of a block within its layer, with a dot at the end: `mlp.`."""
    parts = block.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    tail = parts[numbers[-1] + 1 :] if numbers else parts
    return ".".join([*tail, ""]) if tail else ""
