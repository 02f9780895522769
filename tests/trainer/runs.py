"""Short training runs on tiny models, for the trainer's tests: in this process, or as a program in two by torchrun."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback

import moe_hf
from moe_hf.trainer import MoETrainer, MoETrainingArguments
from tests.tiny_models import random_ids, tiny_dense, tiny_native_moe


KINDS = ("ours", "mixtral")


def tiny_moe(kind: str = "ours", dropout: float = 0.0, **config_fields) -> PreTrainedModel:
    """Return an upcycled llama whose experts differ (`"ours"`), or a native MoE of transformers."""
    if kind != "ours":
        return tiny_native_moe(kind, attention_dropout=dropout, **config_fields)
    dense = tiny_dense("llama", attention_dropout=dropout)
    return moe_hf.upcycle(dense, num_experts=4, noise=0.5, seed=1, **config_fields)


def rows(count: int = 24, length: int = 16, identical: bool = False) -> Dataset:
    """Return `count` rows of random token ids, all scored."""
    ids = random_ids(1 if identical else count, length).tolist() * (count if identical else 1)
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def arguments(output_dir: str | Path, **fields) -> MoETrainingArguments:
    """Return quiet CPU arguments: 4 steps of batches of 4 at a constant learning rate, no checkpoint."""
    defaults = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return MoETrainingArguments(output_dir=str(output_dir), **(defaults | fields))


class GradientRecorder(TrainerCallback):
    """Keeps the gradients of the first optimizer step, by parameter name."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        if not self.gradients:
            self.gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def losses(trainer: MoETrainer) -> list[float]:
    """Return the logged training losses, one per step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def first_gradients(
    model: PreTrainedModel, output_dir: str | Path, dataset: Dataset, **fields
) -> dict[str, torch.Tensor]:
    """Train one step and return its gradients by name."""
    recorder = GradientRecorder()
    args = arguments(output_dir, max_steps=1, **fields)
    MoETrainer(model, args, train_dataset=dataset, callbacks=[recorder]).train()
    return recorder.gradients


def four_steps(
    kind: str, output_dir: str | Path, per_device_batch: int, accumulation: int = 1, **config_fields
) -> dict[str, Any]:
    """Train 4 steps of 8 rows in scope `moe`, z-loss on, balance loss off; returns gradients, weights and losses."""
    z_loss = {"router_z_loss_coef": 0.1} if kind == "ours" else {}
    model = tiny_moe(kind, **({"router_aux_loss_coef": 0.0} | z_loss | config_fields))
    recorder = GradientRecorder()
    args = arguments(
        output_dir,
        scope="moe",
        per_device_train_batch_size=per_device_batch,
        gradient_accumulation_steps=accumulation,
    )
    trainer = MoETrainer(model, args, train_dataset=rows(32), callbacks=[recorder])
    trainer.train()
    return {
        "num_processes": trainer.accelerator.num_processes,
        "ddp": type(trainer.model_wrapped).__name__,
        "gradients": recorder.gradients,
        "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "losses": losses(trainer),
    }


# Updates that are large enough to change choices within four steps.
BIASED = {"balance_strategy": "bias", "bias_update_rate": 0.02, "scoring_func": "sigmoid"}
GLOBAL_BATCH = {"balance_loss_scope": "global_batch", "router_aux_loss_coef": 1.0}


# A margin that closes experts within four steps.
WITH_STATE = {"router_type": "dense_margin", "num_experts_per_tok": 4, "router_kwargs": {"margin": 0.02}}


def router_states(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return what routers have added up over a run, among the tensors of a model."""
    return {name: tensor for name, tensor in weights.items() if name.endswith("gate_total")}


def correction_biases(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the correction biases among the tensors of a model."""
    return {name: tensor for name, tensor in weights.items() if name.endswith("e_score_correction_bias")}


def of_all_processes(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return each process's tensors."""
    gathered: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, tensors)
    return gathered


def resumed(kind: str, output_dir: str | Path, checkpoint: str | Path | None = None, **config_fields) -> MoETrainer:
    """Train 6 steps with dropout and a decaying rate, saving at 3 and 6; from `checkpoint` where given."""
    fields = {"router_jitter_noise": 0.1} | config_fields if kind == "ours" else {}
    args = arguments(
        output_dir,
        scope="moe",
        max_steps=6,
        save_strategy="steps",
        save_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
    )
    trainer = MoETrainer(tiny_moe(kind, dropout=0.2, **fields), args, train_dataset=rows(28))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def main(folder: Path) -> None:
    """Do every run of the distributed tests in this process group; the main process writes `results.pt`."""
    results: dict[str, Any] = {}
    for kind in KINDS:
        results[f"four_steps_{kind}"] = four_steps(kind, folder / f"four_{kind}", per_device_batch=4)
    for name, fields in (("biased", BIASED), ("global_batch", GLOBAL_BATCH)):
        results[name] = four_steps("ours", folder / name, per_device_batch=4, **fields)
    results["biased_accumulated"] = four_steps(
        "ours", folder / "biased_2", per_device_batch=2, accumulation=2, **BIASED
    )
    results["router_state"] = four_steps("ours", folder / "state", per_device_batch=4, **WITH_STATE)
    results["router_states"] = of_all_processes(router_states(results["router_state"]["weights"]))
    results["biases"] = of_all_processes(correction_biases(results["biased"]["weights"]))
    results["four_steps_accumulated"] = four_steps("ours", folder / "four_2", per_device_batch=2, accumulation=2)
    whole = resumed("ours", folder / "whole")
    again = resumed("ours", folder / "again", folder / "whole" / "checkpoint-3")
    results["resume"] = [(t.model.state_dict(), losses(t)) for t in (whole, again)]
    results["world_size"] = torch.distributed.get_world_size()
    results["backend"] = torch.distributed.get_backend()
    if os.environ["RANK"] == "0":
        torch.save(results, folder / "results.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
