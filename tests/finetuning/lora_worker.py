"""What `test_lora_distributed` runs in two processes: each layout's loss, adapter gradients and adapters in a file."""

import sys
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from moe_hf.finetuning import ExpertLoraConfig, add_expert_lora, load_expert_lora, save_expert_lora
from tests.tiny_models import random_ids, tiny_native_moe


LAYOUTS = {"ddp": None, "fsdp": {"fsdp_size": 2}, "ep_fsdp": {"fsdp_size": 2, "ep_size": 2}}
# Expert 1 of layer 0 is the first process's alone: there the second has no adapter.
OPTIONS = {
    "all": {"rank_pattern": {"*.2": 2}},
    "chosen_dora": {"use_dora": True, "experts": {"0": [1], "1": [0, 2, 3]}},
}


def config(option: str) -> ExpertLoraConfig:
    return ExpertLoraConfig(r=3, alpha=5.0, **OPTIONS[option])


def adapters_of(option: str, folder: Path):
    """A model of one process whose adapters are the ones in `folder`."""
    return load_expert_lora(tiny_native_moe("qwen3_moe"), folder / option)


def gradients(model, batches: list[torch.Tensor]) -> dict:
    loss = sum(model(input_ids=batch, labels=batch).loss for batch in batches) / len(batches)
    loss.backward()
    trained = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), "grads": {name: p.grad for name, p in trained.items()}}


def run(layout: str, option: str, folder: Path) -> dict:
    batch = random_ids(2, seed=distributed.get_rank())
    model = tiny_native_moe("qwen3_moe")
    if layout == "ddp":
        model = DistributedDataParallel(load_expert_lora(model, folder / option))
    else:
        cls = type(model)
        settings, _, mesh = cls.prepare_distribute_model(DistributedConfig(**LAYOUTS[layout]))
        model = cls.maybe_distribute_model(model, settings, mesh)
        assert isinstance(model, FSDPModule)
        add_expert_lora(model, config(option))
        load_expert_lora(model, folder / option)
    result = gradients(model, [batch])
    distributed.all_reduce(result["loss"])
    result["loss"] /= 2
    assert all(grad is not None for grad in result["grads"].values())
    result["sharded"] = {name for name, grad in result["grads"].items() if hasattr(grad, "full_tensor")}
    # Adapters of all processes, by their gradients: a file puts each in its expert's place.
    inner = model.module if layout == "ddp" else model
    with torch.no_grad():
        for parameter in inner.parameters():
            if parameter.requires_grad:
                parameter.copy_(parameter.grad)
    save_expert_lora(inner, folder / f"{layout}_{option}")
    result.pop("grads")
    return result


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    assert distributed.get_world_size() == 2
    torch.set_num_threads(1)
    results = {(layout, option): run(layout, option, folder) for layout in LAYOUTS for option in OPTIONS}
    if distributed.get_rank() == 0:
        torch.save({"world_size": 2, "backend": distributed.get_backend(), **results}, folder / "results.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
