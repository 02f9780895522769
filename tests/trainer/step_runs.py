"""What a training step does in two processes; a program for torchrun that writes `steps.pt`."""

import itertools
import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

import moe_hf
from moe_hf.modeling.step_labels import share_of_step
from tests.tiny_models import random_ids, tiny_native_moe
from tests.trainer.multiplier import ACCUMULATIONS, HAS_TRL, MODELS, WAYS, multipliers, router_gradient
from tests.trainer.runs import GradientRecorder, arguments, of_all_processes, rows, tiny_moe
from tests.trainer.unlabelled import SHARED, run


WITH_BIAS = ("glm4_moe", "deepseek_v3")
ONE_GROUP = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}


def padded_rows(count: int = 16, length: int = 16) -> Dataset:
    """Rows of different lengths, padded on either side, of which the later part is scored."""
    ids = random_ids(count, length, seed=5)
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(count):
        padding = row * 5 % 11
        where = slice(0, padding) if row % 3 == 0 else slice(length - padding, length)
        mask[row, where] = 0
        labels[row, where] = -100
        labels[row, : row % 4 + 2] = -100
    return Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()})


def joint_gradient(kind: str, folder: Path, per_device_batch: int, accumulation: int) -> torch.Tensor:
    """The routers' gradient of a step of joint statistics on padded rows, without the language-modelling loss's."""
    gradients = []
    for coefficient in (1.0, 0.0):
        recorder = GradientRecorder()
        args = arguments(
            folder,
            max_steps=1,
            per_device_train_batch_size=per_device_batch,
            gradient_accumulation_steps=accumulation,
            router_aux_loss_coef=coefficient,
            router_z_loss_coef=0.1 * coefficient,
            balance_loss_scope="global_batch",
        )
        moe_hf.MoETrainer(tiny_moe(kind), args, train_dataset=padded_rows(), callbacks=[recorder]).train()
        gradients.append(router_gradient(recorder.gradients))
    return gradients[0] - gradients[1]


def native_biases(family: str, folder: Path, per_device_batch: int) -> dict[str, torch.Tensor]:
    """The correction biases of a MoE of transformers after three steps, by name."""
    model = tiny_native_moe(family, **ONE_GROUP)
    args = arguments(folder, max_steps=3, per_device_train_batch_size=per_device_batch)
    callback = moe_hf.ExpertBalanceCallback(rate=0.02)
    trainer = moe_hf.MoETrainer(model, args, train_dataset=rows(24), callbacks=[callback])
    trainer.train()
    wrapped = trainer.model_wrapped
    assert not hasattr(wrapped, "broadcast_buffers") or wrapped.broadcast_buffers
    return {name: b.clone() for name, b in model.state_dict().items() if name.endswith("e_score_correction_bias")}


def telemetry(kind: str, folder: Path, per_device_batch: int) -> dict[str, float]:
    """What is logged of the routers in the first of two steps."""
    args = arguments(folder, max_steps=2, per_device_train_batch_size=per_device_batch, routing_telemetry="detailed")
    trainer = moe_hf.MoETrainer(tiny_moe(kind, router_aux_loss_coef=0.0), args, train_dataset=padded_rows())
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    return {name: value for name, value in first.items() if name.startswith("routing/")}


def stopped(folder: Path) -> str:
    """The error of a run whose gradient is not finite in the last process alone."""
    model = tiny_moe()
    if os.environ.get("RANK") == "1":
        model.model.layers[1].mlp.gate.weight.register_hook(lambda gradient: gradient * float("nan"))
    try:
        moe_hf.MoETrainer(model, arguments(folder, max_grad_norm=1.0), train_dataset=rows(16)).train()
    except moe_hf.MoEError as error:
        return str(error)
    return "nothing stopped it"


def shares() -> list[float]:
    """What two processes' micro-batches of 3 and 5 tokens, with 2 and 1 of 6 labels, count for, and without labels."""
    rank = int(os.environ["RANK"])
    tokens, labels = (3, 5)[rank], (2, 1)[rank]
    return [float(share_of_step(tokens, labels, 6, joint)) for joint in (False, True)] + [
        float(share_of_step(tokens, joint=True))
    ]


def main(folder: Path) -> None:
    """All runs of this process group; the main process writes their results."""
    ways = WAYS if HAS_TRL else WAYS[:2]
    results: dict[Any, Any] = {
        (way, kind): multipliers(way, kind, ACCUMULATIONS, folder / f"{way}_{kind}")
        for way, kind in itertools.product(ways, MODELS)
    }
    for kind, accumulation in itertools.product(MODELS, (1, 4)):
        name = f"joint_{kind}_{accumulation}"
        results[name] = joint_gradient(kind, folder / name, 8 // accumulation, accumulation)
    for family in WITH_BIAS:
        results[family] = of_all_processes(native_biases(family, folder / family, per_device_batch=4))
    for kind in MODELS:
        results[f"telemetry_{kind}"] = telemetry(kind, folder / f"telemetry_{kind}", per_device_batch=4)
    for name in SHARED:
        results[f"unlabelled {name}"] = run(name, folder / name)
    results["stopped"] = of_all_processes(stopped(folder / "stopped"))
    results["shares"] = of_all_processes(shares())
    results["world_size"] = torch.distributed.get_world_size()
    results["backend"] = torch.distributed.get_backend()
    if os.environ["RANK"] == "0":
        torch.save(results, folder / "steps.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
