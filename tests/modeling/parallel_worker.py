"""One rank of test_parallel: loads a model sharded, compares it with the whole one, saves it."""

import os
import sys

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import moe_hf  # noqa: F401  registers the Auto classes


LAYOUTS = {
    "tp": {"tp_size": 2},
    "tp_ep": {"tp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
    "ep_fsdp": {"fsdp_size": 2, "ep_size": 2},
}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def compare(folder: str, layout: str) -> None:
    reference = AutoModelForCausalLM.from_pretrained(folder).train()
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=DistributedConfig(**LAYOUTS[layout])
    ).train()
    assert dist.get_world_size() == 2
    rank = dist.get_rank()
    sharded = [n for n, p in model.named_parameters() if ".experts." in n and hasattr(p, "placements")]
    assert sharded, "no expert is sharded"
    ids = torch.randint(0, 112, (2, 11), generator=torch.Generator().manual_seed(0))
    same_batch = layout.startswith("tp")
    mine = ids if same_batch else ids[rank : rank + 1]
    output = model(mine, labels=mine)
    output.loss.backward()
    if same_batch:
        expected = reference(ids, labels=ids)
        expected.loss.backward()
    else:
        halves = [reference(ids[i : i + 1], labels=ids[i : i + 1]) for i in range(2)]
        (sum(half.loss for half in halves) / 2).backward()
        expected = halves[rank]
    logits = whole(output.logits)
    assert float((logits - expected.logits).detach().norm() / expected.logits.detach().norm()) <= 2e-6
    true = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        error = float((whole(parameter.grad) - true[name]).norm() / true[name].norm().clamp_min(1e-8))
        assert error <= 1e-5, (name, error)
    model.save_pretrained(f"{folder}_{layout}")
    dist.barrier()
    if rank == 0:
        again = AutoModelForCausalLM.from_pretrained(f"{folder}_{layout}")
        for name, tensor in reference.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name
    dist.barrier()


if __name__ == "__main__":
    for layout in LAYOUTS:
        compare(sys.argv[1], layout)
    # In one write: two processes share the pipe.
    os.write(sys.stdout.fileno(), f"compared {' '.join(LAYOUTS)}\n".encode())
    dist.destroy_process_group()
