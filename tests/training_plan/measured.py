"""Trains for two steps and prints what the allocator gave out at most: `python -m tests.training_plan.measured`."""

import json
from contextlib import nullcontext

import torch
from torch.profiler import ProfilerActivity, profile

from moe_hf.finetuning import apply_scope
from moe_hf.training_plan.step_memory import OPTIMIZERS
from tests.training_plan.models import BATCH, CASES, SEQUENCE, build


def peak(family: str, scope: str, checkpointing: bool, accumulation: int, dtype: torch.dtype) -> int:
    """Most bytes that were allocated in the second step, those of the model and the optimizer included."""
    model = build(family, dtype).train()
    apply_scope(model, scope)
    model.set_experts_implementation("grouped_mm")
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    update = OPTIMIZERS["adamw"](trained)
    autocast = torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else nullcontext()

    def step() -> None:
        for _ in range(accumulation):
            ids = torch.randint(0, 2000, (BATCH, SEQUENCE))
            with autocast:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            del loss
        update.step()
        update.zero_grad()

    step()
    states = [value for state in update.state.values() for value in state.values()]
    held = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *states])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    changes = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return held + most


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps({name: peak(*case) for name, case in CASES.items()}))
