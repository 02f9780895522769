"""Low-rank adapters of experts, computed on the activations: the cost follows the rows and the rank, not the experts.

Letters: E experts, C experts of a layer that have an adapter, r rank, I inputs, O outputs of a map.
"""

import hashlib

import torch
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.finetuning.expert_selection import ExpertSelection
from moe_hf.finetuning.lora_config import ExpertLoraConfig
from moe_hf.finetuning.lora_projection import DoraProjection, LoraProjection, adapter_dtype
from moe_hf.finetuning.lora_sharding import ExpertPlacement, is_sharded, local, placement_of, whole
from moe_hf.finetuning.moe_blocks import experts_in, find_moe_blocks, return_to_shards
from moe_hf.finetuning.save_guard import guard_saving
from moe_hf.kernels import (
    LinearMap,
    base_map,
    describe_experts,
    grouped_experts,
    refuse_stored,
    restore,
    run_in_place_of,
    stored_experts_forward,
)
from moe_hf.unwrapping import unwrapped


CHILD = "lora_adapter"


class ExpertLora(nn.Module):
    """The adapters of one layer: `{map}_A` (C, r, I), `{map}_B` (C, r, O), with DoRA `{map}_magnitude` (C, O).

    Ranks below the largest are filled up with zeros, which get no gradient. Attributes: `ids` are the experts, `local_ids`
    their places in the module's tensors, `ranks` theirs; `all_ids` has those of other processes too, and `places` says whose
    adapter is in each row of all processes' tensors, None where a row is nobody's.
    """

    def __init__(
        self,
        experts: nn.Module,
        block: str,
        ids: tuple[int, ...],
        config: ExpertLoraConfig,
        placement: ExpertPlacement,
    ) -> None:
        super().__init__()
        self.config, self.placement, self.merged, self._originals = config, placement, False, {}
        description, layer = describe_experts(experts), layer_of(block)
        num_experts = experts_in(experts)
        self.all_ids, self.num_experts = ids, num_experts
        parts = placement.split(ids, num_experts)
        self.ids = parts[placement.part()]
        self.local_ids = tuple(i - placement.part() * (num_experts // placement.num_parts) for i in self.ids)
        # As many places on each process as the fullest needs.
        num_slots = max(map(len, parts))
        self.places = tuple(i for part in parts for i in (*part, *[None] * (num_slots - len(part))))
        self.ranks = tuple(config.rank_of(layer, expert) for expert in self.ids)
        rank = max(config.rank_of(layer, expert) for expert in ids)
        self.targets = tuple(name for name in (description.first, description.second) if name in config.target)
        for name in self.targets:
            weight = getattr(experts, name)
            outputs, inputs = weight.shape[1:][::-1] if description.transposed else weight.shape[1:]
            device, dtype = local(weight).device, torch.promote_types(weight.dtype, torch.float32)
            down = torch.zeros(num_slots, rank, inputs, dtype=dtype)
            for slot, (expert, own_rank) in enumerate(zip(self.ids, self.ranks, strict=True)):
                generator = torch.Generator().manual_seed(_seed(config.seed, layer, expert, name))
                down[slot, :own_rank].uniform_(-(inputs**-0.5), inputs**-0.5, generator=generator)
            up = torch.zeros(num_slots, rank, outputs, dtype=dtype, device=device)
            self.register_parameter(f"{name}_A", placement.parameter(down.to(device)))
            self.register_parameter(f"{name}_B", placement.parameter(up))
            if config.use_dora:
                squared = torch.ones(num_slots, outputs, dtype=dtype, device=device)
                matrices = whole(weight).detach()
                for slot, expert in enumerate(self.ids):
                    matrix = matrices[expert].to(dtype)
                    squared[slot] = (matrix.t() if description.transposed else matrix).square().sum(1)
                self.register_buffer(f"{name}_squared", squared, persistent=False)
                self.register_parameter(f"{name}_magnitude", placement.parameter(squared.sqrt()))

    @property
    def scales(self) -> tuple[float, ...]:
        """What B A of each adapter is multiplied by, (C)."""
        return tuple(self.config.scale_of(rank) for rank in self.ranks)

    def tensors(self, name: str, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """A, B, and with DoRA the magnitude and |W|^2, of the map `name` and of the experts here; A and B in `dtype`."""
        count = len(self.ids)
        matrices = [local(getattr(self, f"{name}_{factor}"))[:count] for factor in "AB"]
        if self.config.use_dora:
            others = [local(getattr(self, f"{name}_magnitude"))[:count], getattr(self, f"{name}_squared")[:count]]
            return *(matrix.to(dtype) for matrix in matrices), *others
        return tuple(matrix.to(dtype) for matrix in matrices)

    def delta(self, name: str, slot: int, weight: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to `weight` (O, I) of the expert in `slot`, computed in float64."""
        down, up, *dora = (tensor[slot].double() for tensor in self.tensors(name, torch.float64))
        weight = weight.double()
        adapted = weight + self.scales[slot] * (up.t() @ down)
        if dora:
            adapted = adapted * (dora[0] / adapted.norm(dim=1))[:, None]
        return adapted - weight

    def extra_repr(self) -> str:
        ranks = sorted(set(self.ranks))
        return f"experts={list(self.ids)}, ranks={ranks}, target={list(self.targets)}"

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        # Merged, the weights say it all.
        if not self.merged:
            super()._save_to_state_dict(destination, prefix, keep_vars)


def add_expert_lora(model: nn.Module, config: ExpertLoraConfig) -> nn.Module:
    """Give experts of `model` low-rank adapters, in place, and freeze everything else but adapters of PEFT that are there
    already (PEFT, added afterwards, would freeze these).

    They are computed on the activations of their experts' rows. Works on every model whose experts are behind transformers'
    experts interface, before or after it is distributed with `DistributedConfig` (FSDP2, expert parallelism). Adapters are
    float32 (float64 on a float64 model), products are in the dtype of the experts.

    Args:
        config (`ExpertLoraConfig`): which experts, ranks, scale, dropout.

    Returns:
        the same model.

    Raises:
        MoEError: the config does not fit the model, or its experts cannot have adapters; the model is then unchanged.
    """
    given, model = model, unwrapped(model, changes_parameters=True)
    chosen, blocks = chosen_experts(model, config), find_moe_blocks(model)
    for name in chosen:
        _check(name, blocks[name].experts, config)
    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    batches = 1 if distributed is None else distributed.dp_size
    return_to_shards(model)
    adapters = {}
    for name, ids in chosen.items():
        experts = blocks[name].experts
        placement = placement_of(name, getattr(experts, describe_experts(experts).second), batches)
        adapters[name] = ExpertLora(experts, name, ids, config, placement)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and ".lora_" in name)
    for name, adapter in adapters.items():
        experts = blocks[name].experts
        experts.add_module(CHILD, adapter)
        run_in_place_of(experts, expert_lora_forward)
    guard_saving(given)
    return given


def chosen_experts(model: nn.Module, config: ExpertLoraConfig) -> dict[str, tuple[int, ...]]:
    """The experts that get adapters by the name of their block.

    Raises:
        MoEError: there is no MoE block, or the config names experts that are not there.
    """
    blocks = find_moe_blocks(model)
    if not blocks:
        raise MoEError(f"{type(model).__name__} has no MoE block. Upcycle a dense model first.")
    if config.experts is None:
        return {name: tuple(range(experts_in(block.experts))) for name, block in blocks.items()}
    return ExpertSelection.load(config.experts).resolve(model)


def _check(name: str, experts: nn.Module, config: ExpertLoraConfig) -> None:
    description = describe_experts(experts)
    if not {description.first, description.second} & set(config.target):
        raise MoEError(
            f"The experts of {name} have {description.first} and {description.second}, not {config.target}."
        )
    if not hasattr(type(experts).forward, "__wrapped__"):
        raise MoEError(
            f"The experts of {name} ({type(experts).__name__}) mix the weights of all: none can be adapted."
        )
    if getattr(experts, "widths", None) is not None:
        raise MoEError(f"The experts of {name} differ in width: an adapter would fill the neurons they do not have.")
    # Quantized or offloaded experts are a frozen base like any other.
    function = vars(experts).get("_experts_function", stored_experts_forward)
    if function is not stored_experts_forward or hasattr(experts, CHILD):
        raise MoEError(
            f"The experts of {name} have adapters or parameters of their own already. Merge or remove these first "
            "(merge_expert_lora, remove_expert_lora, merge_selected_experts)."
        )


# Sizes of groups depend on the data: one break of a compiled graph per layer, instead of one at each of them.
@torch.compiler.disable
def expert_lora_forward(
    experts: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """(T, D), (T, K), (T, K) -> (T, D): the experts with their adapters."""
    adapter, description = experts.get_submodule(CHILD), describe_experts(experts)
    dropout = adapter.config.dropout if adapter.training else 0.0
    maps = []
    for name in (description.first, description.second):
        base = base_map(experts, description, name)
        if name in adapter.targets:
            projection = LoraProjection(adapter.scales, dropout)
            if adapter.config.use_dora:
                projection = DoraProjection(adapter.scales, dropout, adapter.local_ids)
            weight = base.tensors[0]
            dtype = adapter_dtype(weight, len(adapter.local_ids) * max(adapter.ranks, default=0))
            base = LinearMap(projection, (weight, *adapter.tensors(name, dtype)), base.bias)
        maps.append(base)
    first, second = maps
    return grouped_experts(
        experts, hidden_states, top_k_index, top_k_weights, first=first, second=second, last=adapter.local_ids
    )


@torch.no_grad()
def merge_expert_lora(model: nn.Module, *, unload: bool = False) -> nn.Module:
    """Add the adapters to the experts' weights, in place; the sum is made in float64 and rounded once.

    Args:
        unload (`bool`): remove the adapters, for good. Otherwise `unmerge_expert_lora` brings back the weights bit by bit,
            from a copy in host memory; until then the adapters are no part of the model's state dict.

    Returns:
        the same model.

    Raises:
        MoEError: the model has no adapters, they are merged already, or its experts are sharded, quantized or offloaded.
    """
    given, model = model, unwrapped(model, changes_parameters=unload)
    adapted = _adapted(model, merged=False)
    for name, block in find_moe_blocks(model).items():
        refuse_stored(name, block.experts)
    for experts, adapter in adapted:
        description = describe_experts(experts)
        for name in adapter.targets:
            stacked = getattr(experts, name)
            ids = list(adapter.local_ids)
            if not unload:
                adapter._originals[name] = stacked.data[ids].cpu()
            for slot, expert in enumerate(ids):
                weight = stacked.data[expert]
                matrix = weight.t() if description.transposed else weight
                matrix.copy_(matrix.double() + adapter.delta(name, slot, matrix))
        restore(experts)
        adapter.merged = True
        if unload:
            delattr(experts, CHILD)
    return given


@torch.no_grad()
def unmerge_expert_lora(model: nn.Module) -> nn.Module:
    """Undo `merge_expert_lora`: the weights are what they were bit by bit, and the adapters are computed again; in place.

    Raises:
        MoEError: the model has no merged adapters.
    """
    for experts, adapter in _adapted(unwrapped(model), merged=True):
        for name, rows in adapter._originals.items():
            stacked = getattr(experts, name).data
            stacked[list(adapter.local_ids)] = rows.to(stacked.device)
        adapter._originals, adapter.merged = {}, False
        run_in_place_of(experts, expert_lora_forward)
    return model


def remove_expert_lora(model: nn.Module) -> nn.Module:
    """Remove the adapters of `model` without merging them, in place; all parameters stay frozen.

    Raises:
        MoEError: the model has no adapters, or they are merged.
    """
    for experts, _ in _adapted(unwrapped(model, changes_parameters=True), merged=False, may_be_sharded=True):
        restore(experts)
        delattr(experts, CHILD)
    return model


def lora_adapters(model: nn.Module) -> dict[str, ExpertLora]:
    """The adapters of `model`, by the name of their MoE block."""
    return {
        name.removesuffix(f".experts.{CHILD}"): m for name, m in model.named_modules() if isinstance(m, ExpertLora)
    }


def layer_of(block: str) -> str:
    """The number of the layer that a MoE block is in, from its name."""
    numbers = [part for part in block.split(".") if part.isdigit()]
    return numbers[0] if numbers else "0"


def _adapted(model: nn.Module, *, merged: bool, may_be_sharded: bool = False) -> list[tuple[nn.Module, ExpertLora]]:
    blocks = find_moe_blocks(model)
    found = [(blocks[name].experts, adapter) for name, adapter in lora_adapters(model).items()]
    if not found:
        raise MoEError(f"{type(model).__name__} has no adapters of experts: add_expert_lora(model, config) first.")
    for experts, adapter in found:
        if adapter.merged != merged:
            state, remedy = (
                ("merged", "unmerge_expert_lora") if adapter.merged else ("not merged", "merge_expert_lora")
            )
            raise MoEError(f"The adapters are {state}: call {remedy} first.")
        if not may_be_sharded and is_sharded(experts):
            raise MoEError(
                "The experts are sharded. Save the adapters, load them onto a whole model, and merge there."
            )
    return found


def _seed(seed: int, layer: str, expert: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}/{layer}/{expert}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
