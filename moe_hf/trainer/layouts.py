"""Layouts: how a model and its batches are spread over processes, by transformers' `DistributedConfig`.

| layout | sizes | each process has | batches |
|---|---|---|---|
| data parallel (DDP) | none | the whole model | one each |
| FSDP2 | `fsdp_size=N` | a slice of everything, gathered layer by layer | one each |
| expert parallel + FSDP2 | `fsdp_size=N, ep_size=M` | some experts; tokens travel to them | one each |
| tensor parallel | `tp_size=N` | a slice of every matrix | one for all N |
| tensor + expert parallel | `tp_size=N, ep_size=M` | slices of the rest, some experts | one for all N |
| HSDP | `dp_replicate_size=R, fsdp_size=N` | as FSDP2, R times over | one each |
"""

import difflib
import os
from collections.abc import Mapping
from dataclasses import fields
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig

from moe_hf.errors import MoEError
from moe_hf.finetuning.scopes import find_moe_blocks
from moe_hf.inspection import EXPERT_COUNT_NAMES
from moe_hf.modeling.parallel_plans import refuse_heads
from moe_hf.trainer.deepspeed import refuse_with_deepspeed


SIZES = ("dp_replicate_size", "fsdp_size", "tp_size", "ep_size")
MESH = ("dp_replicate_size", "fsdp_size", "tp_size")
HOW_TO_START = (
    "Start it with `moe-hf finetune --processes N` or its like; or with `torchrun --nproc-per-node N` or `accelerate launch "
    "--multi_gpu --num_processes N`, on a CPU with ACCELERATE_USE_CPU=true before either: accelerate's own --cpu starts one "
    "process without a word."
)


def choose_layout(
    sizes: Mapping[str, int | None], options: Mapping[str, Any] | None, world_size: int
) -> DistributedConfig | None:
    """The layout of a run, or None where nothing is asked for: one process, or data parallelism by DDP.

    Args:
        sizes (`Mapping[str, int | None]`): of `SIZES`, those that are asked for. An `fsdp_size` that is not is what the
            others leave of the processes.
        options (`Mapping[str, Any]`, *optional*): more fields of `DistributedConfig`, sizes among them or not.
        world_size (`int`): number of processes.

    Raises:
        MoEError: an unknown field, a size that is no number from 1, sizes that contradict each other or do not fit the
            number of processes, pipeline parallelism.
    """
    asked = dict(options or {})
    for name, size in sizes.items():
        if size is not None and asked.setdefault(name, size) != size:
            raise MoEError(f"{name} is {size}, and {asked[name]} in distributed_config. Give it once.")
    _check_fields(asked)
    if not asked:
        return None
    sizes = {name: asked.get(name) or 1 for name in SIZES}
    if asked.get("fsdp_size") is None:
        sizes["fsdp_size"] = max(1, world_size // (sizes["dp_replicate_size"] * sizes["tp_size"]))
    _check_sizes(sizes, world_size)
    if world_size == 1:
        return None
    try:
        return DistributedConfig(**(asked | sizes))
    except (TypeError, ValueError) as error:
        raise MoEError(f"transformers refuses the layout {_listed(sizes)}: {error}") from error


def _check_fields(asked: dict[str, Any]) -> None:
    known = {field.name for field in fields(DistributedConfig)}
    for name in asked:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else f" It has {', '.join(sorted(known))}."
            raise MoEError(f"Unknown field {name!r} of distributed_config.{hint}")
    if (asked.get("pp_size") or 1) > 1:
        raise MoEError(
            "pp_size: transformers has no training loop for pipeline parallelism. Use fsdp_size and ep_size."
        )
    if asked.get("enable_expert_parallel"):
        raise MoEError(
            "enable_expert_parallel is the old way: give ep_size, the number of processes that share experts."
        )
    for name in SIZES:
        size = asked.get(name)
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise MoEError(f"{name} is {size!r}; it must be a whole number from 1.")


def _check_sizes(sizes: dict[str, int], world_size: int) -> None:
    needed = prod(sizes[name] for name in MESH)
    if needed != world_size:
        has = "one process" if world_size == 1 else f"{world_size} processes"
        raise MoEError(f"The layout {_listed(sizes)} needs {needed} processes, and this run has {has}. {HOW_TO_START}")
    shared = sizes["fsdp_size"] * sizes["tp_size"]
    if sizes["ep_size"] > 1 and (sizes["ep_size"] % sizes["tp_size"] or shared % sizes["ep_size"]):
        raise MoEError(
            f"ep_size={sizes['ep_size']} must be a multiple of tp_size, {sizes['tp_size']}, and divide fsdp_size * "
            f"tp_size, {shared}. {'' if world_size > 1 else HOW_TO_START}".rstrip()
        )


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}={sizes[name]}" for name in SIZES if sizes[name] > 1) or "of one process"


def describe_layout(layout: DistributedConfig | None, world_size: int) -> str:
    """The layout in a few words, for logs and messages."""
    if layout is None:
        return "one process" if world_size == 1 else f"DDP over {world_size} processes"
    return f"{_listed({name: getattr(layout, name) for name in SIZES})} over {world_size} processes"


def check_launch(world_size: int) -> None:
    """Refuse processes that were started together and do not know of each other.

    Raises:
        MoEError: WORLD_SIZE, which launchers set, is not the number of processes that were found.
    """
    started = int(os.environ.get("WORLD_SIZE") or 1)
    if started != world_size:
        raise MoEError(
            f"{started} processes were started, and this one found {world_size}: each would train alone. {HOW_TO_START}"
        )


def check_model(model: nn.Module, layout: DistributedConfig | None, world_size: int, find_unused: bool) -> None:
    """Refuse a model that cannot be trained in `layout`, in a sentence.

    Args:
        find_unused (`bool`): whether DDP looks for parameters without a gradient.

    Raises:
        MoEError: experts that `ep_size` does not divide or that are separate modules, a model that is wrapped already.
    """
    if isinstance(model, DistributedDataParallel):
        raise MoEError(
            "The model is wrapped in DistributedDataParallel already: give model.module, and freeze it first."
        )
    blocks = find_moe_blocks(model)
    separate = [name for name, block in blocks.items() if isinstance(block.experts, nn.ModuleList)]
    if layout is None:
        if world_size > 1 and separate and not find_unused and not is_sharded(model):
            raise MoEError(
                f"The experts of {separate[0]!r} are separate modules: one that gets no token has no gradient, and "
                "DistributedDataParallel waits for it. Set ddp_find_unused_parameters=True."
            )
        return
    if layout.ep_size > 1 and separate:
        raise MoEError(
            f"ep_size={layout.ep_size} needs experts that are stacked in one tensor, and those of {separate[0]!r} are "
            "separate modules. Use fsdp_size alone, or the model's form in transformers."
        )
    if not isinstance(model, PreTrainedModel):
        raise MoEError(
            f"A layout needs a model of transformers, and got {type(model).__name__}. Use DDP for adapters."
        )
    refuse_heads(model.config, layout.tp_size)
    for name, block in blocks.items():
        experts = max((len(p) for p in block.experts.parameters() if p.ndim >= 3), default=layout.ep_size)
        _check_divides(layout.ep_size, experts, name)


def check_config(config: PreTrainedConfig, layout: DistributedConfig | None) -> None:
    """As `check_model`, before a model is loaded, where its configuration says how many experts it has.

    Raises:
        MoEError: experts that `ep_size` does not divide, heads that `tp_size` does not.
    """
    if layout is None:
        return
    refuse_heads(config, layout.tp_size)
    for name in EXPERT_COUNT_NAMES:
        experts = getattr(config, name, None)
        # With a number per layer the model says it, as it is built.
        if isinstance(experts, int) and getattr(config, "num_experts_per_layer", None) is None:
            _check_divides(layout.ep_size, experts, type(config).__name__)


def _check_divides(ep_size: int, experts: int, where: str) -> None:
    if experts % ep_size:
        raise MoEError(
            f"ep_size={ep_size} does not divide the {experts} experts of {where}. Choose a divisor, or another number of "
            "experts."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are spread over processes: by transformers' `DistributedConfig`, or FSDP2."""
    return isinstance(model, FSDPModule) or layout_of(model) is not None


def layout_of(model: nn.Module) -> DistributedConfig | None:
    """The layout in which transformers loaded or `distribute` made the model."""
    if not getattr(model, "is_distributed_loading_by_transformers", False):
        return None
    return model.config.distributed_config


@torch.no_grad()
def distribute(model: PreTrainedModel, layout: DistributedConfig) -> PreTrainedModel:
    """Shard a model that each process has whole; the first process's weights count.

    A model that one process cannot hold is upcycled to disk and loaded with
    `from_pretrained(folder, distributed_config=layout)`, where each process reads its part.

    Args:
        model (`PreTrainedModel`): with parameters of one dtype where it is sharded by FSDP.
        layout (`DistributedConfig`): its sizes, with as many processes as they multiply to.

    Returns:
        the model itself, changed in place; optimizers are made afterwards.

    Raises:
        MoEError: a layout that the model cannot have, or that transformers refuses.
    """
    check_model(model, layout, dist.get_world_size() if dist.is_initialized() else 1, find_unused=True)
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if layout.dp_size > 1 and len(dtypes) > 1:
        raise MoEError(
            f"FSDP shards parameters of one dtype, and {type(model).__name__} has {sorted(map(str, dtypes))}. Convert "
            "it, e.g. with model.float(), before it is sharded."
        )
    cls = type(model)
    try:
        layout, device, meshes = cls.prepare_distribute_model(layout)
        model.to(device)
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, src=0)
        _untie(model)
        model = cls.maybe_distribute_model(model, layout, meshes)
    except MoEError:
        raise
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise MoEError(f"transformers refuses {describe_layout(layout, prod_of(layout))}: {error}") from error
    model.tie_weights()
    return model


def _untie(model: PreTrainedModel) -> None:
    """Give a tied weight a parameter of its own, as it has while transformers loads a model: plans name both."""
    for name in getattr(model, "all_tied_weights_keys", None) or {}:
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        tied = getattr(module, attribute)
        setattr(module, attribute, nn.Parameter(tied.detach().clone(), tied.requires_grad))


def prod_of(layout: DistributedConfig) -> int:
    """How many processes a layout needs."""
    return prod(getattr(layout, name) for name in MESH)


def accelerate_shards(args: TrainingArguments) -> bool:
    """Whether the arguments, or the launcher, ask for Accelerate's own FSDP."""
    return bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def place(model: nn.Module, layout: DistributedConfig | None, args: TrainingArguments) -> nn.Module:
    """The model in the layout that a run's arguments ask for, changed in place where it is whole yet.

    Raises:
        MoEError: what they ask for contradicts itself, the machine, or what the model is.
    """
    if args.deepspeed is not None:
        refuse_with_deepspeed(model, layout, args)
    find_unused, present = bool(args.ddp_find_unused_parameters), layout_of(model)
    check_model(model, layout, args.world_size, find_unused)
    if layout is None:
        return model
    if accelerate_shards(args):
        raise MoEError("fsdp_size and Accelerate's FSDP both shard the model: start without its FSDP settings.")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if args.device.type != ("cpu" if accelerator is None else accelerator.type):
        raise MoEError("A layout runs on the accelerator of a machine that has one: leave use_cpu out.")
    if present is None:
        return distribute(model, layout)
    if present.to_dict() != layout.to_dict():
        words = [describe_layout(each, args.world_size) for each in (present, layout)]
        raise MoEError(
            f"The model is sharded already, as {words[0]}; the arguments ask for {words[1]}. Give one of them."
        )
    return model
