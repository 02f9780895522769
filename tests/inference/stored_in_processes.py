"""Adapters over quantized experts in two processes; run by `test_stored_distributed.py`, which starts them."""

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from moe_hf.finetuning import ExpertLoraConfig, add_expert_lora
from moe_hf.inference import load_low_memory, quantize_experts, restore_experts, save_low_memory
from moe_hf.kernels import has_stored
from tests.processes import run_cases
from tests.tiny_models import random_ids, tiny_native_moe


STEPS, RATE = 3, 0.5


def adapted(scheme: str, folder: Path | None = None) -> torch.nn.Module:
    """Mixtral with quantized experts and adapters, from memory or from a folder that this process wrote."""
    model = tiny_native_moe("mixtral", num_hidden_layers=1)
    quantize_experts(model, scheme)
    if folder is not None:
        save_low_memory(model, folder)
        model = load_low_memory(folder)
    # The dropout and the order of experts are those of one process: there is none, and adapters do not depend on it.
    return add_expert_lora(model, ExpertLoraConfig(r=2)).train()


def train(model: torch.nn.Module, batches: list[torch.Tensor], accelerator: Accelerator | None = None) -> dict:
    """Trained parameters after a few steps on rows (B, S), the mean over them the loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    wrapped = model
    if accelerator is not None:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(wrapped, torch.nn.parallel.DistributedDataParallel)
    for ids in batches:
        loss = wrapped(input_ids=ids, labels=ids).loss
        loss.backward() if accelerator is None else accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def ddp(scheme: str, from_folder: bool):
    """Two processes on a half of each batch each, and one on all of it: their largest difference, and how far both moved."""

    def case(folder: Path) -> Any:
        assert dist.get_world_size() == 2
        rank, batches = dist.get_rank(), [random_ids(4, 12, seed=step) for step in range(STEPS)]
        own = folder / f"rank-{rank}" if from_folder else None
        start = {n: p.detach().clone() for n, p in adapted(scheme).named_parameters() if p.requires_grad}
        both = train(adapted(scheme, own), [ids[2 * rank : 2 * rank + 2] for ids in batches], Accelerator(cpu=True))
        alone = train(adapted(scheme), batches)
        for value in both.values():
            theirs = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(theirs, value)
            assert torch.equal(*theirs)
        assert both.keys() == alone.keys() == start.keys()
        moved = max((alone[n] - start[n]).abs().max().item() for n in alone)
        return {"difference": max((both[n] - alone[n]).abs().max().item() for n in alone), "moved": moved}

    return case


def restored(folder: Path) -> bool:
    """Experts that are plain again are plain for DDP too: they are sent, and get gradients."""
    model = tiny_native_moe("mixtral", num_hidden_layers=1)
    quantize_experts(model, "int8")
    restore_experts(model).requires_grad_(True)
    assert not has_stored(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    ids = random_ids(2, 8, seed=dist.get_rank())
    wrapped(input_ids=ids, labels=ids).loss.backward()
    equal = []
    for parameter in model.parameters():
        theirs = [torch.empty_like(parameter) for _ in range(2)]
        dist.all_gather(theirs, parameter.grad)
        equal.append(torch.equal(*theirs))
    return all(equal)


CASES = {
    "int8": ddp("int8", False),
    "nf4": ddp("nf4", False),
    "nf4 from a folder": ddp("nf4", True),
    "restored": restored,
}


if __name__ == "__main__":
    run_cases(CASES, Path(sys.argv[1]))
