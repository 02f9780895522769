"""The optimizer's state on disk, in two forms that every layout reads.

A whole one is `optimizer.pt`, as transformers' Trainer writes it. A sharded one is a folder `optimizer`, where each process
writes its part (torch.distributed.checkpoint), by names of parameters. `optimizer_parameters.json` names the parameters of
each group: a whole state numbers them, and one layout may have more groups than another.
"""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers.distributed.checkpoint import _redistribute_state_dict, load_optimizer_distributed

from moe_hf.errors import MoEError


WHOLE, SHARDED, NAMES = "optimizer.pt", "optimizer", "optimizer_parameters.json"
KEY = "optimizer"


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """The names of the parameters in each group of `optimizer`."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer, *, copied: bool) -> dict[str, Any]:
    """The state by names, each process's part; all processes call it.

    Args:
        copied (`bool`): tensors of its own on the CPU, which later steps do not change.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    # Strided slices of fused matrices cannot be written as they are.
    state = _redistribute_state_dict(get_optimizer_state_dict(model, optimizer, options=options))
    return copies(state) if copied else state


def copies(tensors: Any) -> Any:
    """Nested containers of tensors with copies on the CPU in their place; those that share memory still do."""
    known: dict[tuple, torch.Tensor] = {}

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()
        if isinstance(tensor, DTensor):
            return tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        if tensor.numel() == 0 or key not in known:
            known[key] = tensor.cpu() if tensor.device.type != "cpu" else tensor.clone()
        return known[key]

    return tree_map_only(torch.Tensor, copy, tensors)


def write_sharded(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write what `sharded_state` gave; all processes call it, of `group` where that is given."""
    with _quiet():
        dcp.save({KEY: state}, checkpoint_id=folder / SHARDED, process_group=group)


def write_names(names: list[list[str]], folder: Path) -> None:
    """Write the names of the parameters in each group."""
    (folder / NAMES).write_text(json.dumps(names) + "\n", encoding="utf-8")


def has_state(folder: Path) -> bool:
    """Whether a checkpoint has an optimizer's state."""
    return (folder / WHOLE).is_file() or (folder / SHARDED / ".metadata").is_file()


def load_state_(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *, sharded: bool) -> None:
    """Load the state in a checkpoint's folder, whatever layout wrote it; all processes call it.

    Args:
        model (`nn.Module`): without a wrapper of accelerate or DDP.
        sharded (`bool`): whether parameters of `model` are spread over processes.

    Raises:
        MoEError: the state is of other parameters, or of another kind of optimizer.
    """
    names = parameter_names(model, optimizer)
    saved = json.loads((folder / NAMES).read_text("utf-8")) if (folder / NAMES).is_file() else None
    _check_names(names, saved, folder)
    try:
        if (folder / SHARDED).is_dir():
            with _quiet():
                load_optimizer_distributed(model, optimizer, str(folder / SHARDED))
            return
        state = torch.load(folder / WHOLE, map_location="cpu", weights_only=True, mmap=True)
        if not sharded:
            optimizer.load_state_dict(state)
            return
        if saved is None:
            raise MoEError(f"{folder} has no {NAMES}: its optimizer state can be resumed by unsharded runs only.")
        _distribute_state(model, optimizer, dict(_by_names(state, saved)))
    except (KeyError, RuntimeError, ValueError, dcp.api.CheckpointException) as error:
        if isinstance(error, MoEError):
            raise
        raise MoEError(f"The optimizer state in {folder} does not fit {type(optimizer).__name__}: {error}") from error


def _distribute_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole state by names, of which each process takes its part."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    for key, own in get_optimizer_state_dict(model, optimizer, options=options).items():
        if isinstance(own, DTensor):
            whole = state[key].to(own.device)
            state[key] = distribute_tensor(whole, own.device_mesh, own.placements, src_data_rank=None)
    set_optimizer_state_dict(model, optimizer, state, options=options)


def _by_names(state: dict[str, Any], names: list[list[str]]) -> Iterator[tuple[str, Any]]:
    """A whole state in the flat form of a sharded one."""
    for group, group_names in zip(state["param_groups"], names, strict=True):
        for index, name in zip(group["params"], group_names, strict=True):
            for key, value in state["state"].get(index, {}).items():
                yield f"state.{name}.{key}", value
            for key, value in group.items():
                if key != "params":
                    yield f"param_groups.{name}.{key}", value


def _check_names(names: list[list[str]], saved: list[list[str]] | None, folder: Path) -> None:
    if saved is None:
        return
    now, then = ({name for group in groups for name in group} for groups in (names, saved))
    if now != then:
        example = sorted(now ^ then)[0]
        raise MoEError(
            f"The optimizer state in {folder} is of other parameters: {len(then)} trained there, {len(now)} train now, "
            f"and {example!r} in one of the two only. Use the scope of that run, or start a new one from its weights."
        )


class _quiet(warnings.catch_warnings):
    """Without torch's warning that one process saves and loads alone, and those about its own internals."""

    def __enter__(self):
        super().__enter__()
        warnings.simplefilter("ignore")
