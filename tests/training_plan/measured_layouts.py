"""Trains for two steps on two processes and notes what the allocator gave out at most, by layout."""

import gc
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function
from transformers.distributed import DistributedConfig

from moe_hf.finetuning import apply_scope
from moe_hf.trainer.layouts import distribute
from moe_hf.training_plan.step_memory import OPTIMIZERS
from tests.processes import run_cases
from tests.training_plan.models import BATCH, LAYOUT_CASES, SEQUENCE, build


LAYOUTS = {
    "DDP": None,
    "FSDP2": {"fsdp_size": 2},
    "EP+FSDP2": {"fsdp_size": 2, "ep_size": 2},
}
SECOND = "second step"


def step(model: nn.Module, updates: list[torch.optim.Optimizer], accumulation: int) -> None:
    """One optimizer step."""
    for number in range(accumulation):
        # As Accelerate does: DDP sums gradients in the last micro-batch.
        apart = isinstance(model, DistributedDataParallel) and number + 1 < accumulation
        torch.manual_seed(number + 10 * dist.get_rank())
        ids = torch.randint(0, 2000, (BATCH, SEQUENCE))
        with model.no_sync() if apart else nullcontext():
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
        del loss
    for update in updates:
        update.step()
        update.zero_grad()


def peak(layout: str, family: str, scope: str, checkpointing: bool, accumulation: int, folder: Path) -> dict[str, int]:
    """Bytes of one process: of weights and of moments, and the most that was allocated in the second step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        model = build(family, torch.float32).train()
        apply_scope(model, scope)
        model.set_experts_implementation("grouped_mm")
        if checkpointing:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        sizes = LAYOUTS[layout]
        model = DistributedDataParallel(model) if sizes is None else distribute(model, DistributedConfig(**sizes))
        by_mesh: dict = {}
        for parameter in model.parameters():
            if parameter.requires_grad:
                mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
                by_mesh.setdefault(mesh, []).append(parameter)
        updates = [OPTIMIZERS["adamw"](parameters) for parameters in by_mesh.values()]
        gc.collect()
        step(model, updates, accumulation)
        with record_function(SECOND):
            step(model, updates, accumulation)
    states = [value for update in updates for state in update.state.values() for value in state.values()]
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    start = next(event.start_ns() for event in events if event.name() == SECOND)
    live = most = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live) if event.start_ns() >= start else live
    return {
        "weights": sum(local(tensor).nbytes for tensor in [*model.parameters(), *model.buffers()]),
        "optimizer": sum(local(tensor).nbytes for tensor in states),
        "peak": most,
    }


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    cases = {
        f"{layout}, {name}": partial(peak, layout, *case) for layout in LAYOUTS for name, case in LAYOUT_CASES.items()
    }
    run_cases(cases, Path(sys.argv[1]))
