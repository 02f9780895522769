"""The layout of PEFT's LoRA on `target_parameters`, both ways.

PEFT stacks the experts of a weight (E, O, I) in `lora_A` (E * r, I), an expert's rows together, and in `lora_B` (O, r * E),
an expert's columns E apart. Where several weights of a module have adapters it nests them: the first in the module's order
is the innermost, under one `base_layer` for each that follows.
"""

from typing import Any

import torch
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_lora import ExpertLora, layer_of
from moe_hf.finetuning.lora_config import TARGETS, ExpertLoraConfig
from moe_hf.finetuning.moe_blocks import experts_in, find_moe_blocks


PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
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


def from_peft(model: nn.Module, peft_config: dict[str, Any], tensors: Matrices) -> tuple[ExpertLoraConfig, Matrices]:
    """The inverse: a config, and tensors named `{block}.{map}_{A or B}`, of all experts.

    Raises:
        MoEError: the files are not of `target_parameters` on experts alone, or do not fit the model.
    """
    targets = peft_config.get("target_parameters")
    # PEFT itself takes a list; a pattern as one text names parameters that only it can find.
    targets = targets if isinstance(targets, list) else []
    names = tuple(name for name in TARGETS if any(str(target).rpartition(".")[2] == name for target in targets))
    if peft_config.get("peft_type") != "LORA" or not names or peft_config.get("rank_pattern"):
        raise MoEError(
            "The files of PEFT are no LoRA on target_parameters of experts with one rank. Load them with PeftModel."
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
                down = left.pop(f"{where}.lora_A.weight").reshape(num_experts, config.r, inputs)
                up = left.pop(f"{where}.lora_B.weight").reshape(outputs, config.r, num_experts)
            except (KeyError, RuntimeError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise MoEError(f"The files of PEFT do not fit {block}.experts.{name}: {reason}.") from error
            result[f"{block}.{name}_A"] = down.contiguous()
            result[f"{block}.{name}_B"] = up.permute(2, 1, 0).contiguous()
    if left:
        raise MoEError(f"The files of PEFT also have {min(left)}, which is no expert. Load them with PeftModel.")
    return config, result


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
