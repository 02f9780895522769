"""Runs some of whose steps have nothing to learn, for tests in one process and in two."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import MixtralForTokenClassification, Trainer, TrainerCallback, TrainingArguments

import moe_hf
from moe_hf import MoEForTokenClassification
from tests.tiny_models import random_ids, tiny_dense
from tests.trainer.multiplier import word_tokenizer
from tests.trainer.runs import arguments, losses, tiny_moe


# Which rows have labels, in three steps of four: none; one row in one of two processes; most.
PATTERN = (0, 0, 0, 0) + (0, 1, 0, 0) + (1, 1, 0, 1)
# Who trains what. Stock `Trainer` has the losses of our models in their forward pass.
RUNS = {
    "ours": ("moe_trainer", "ours", {}),
    "mixtral": ("moe_trainer", "mixtral", {}),
    "dense": ("moe_trainer", "dense", {}),
    "ours in a stock Trainer": ("stock", "ours", {}),
    "mixtral with add_router_losses": ("added", "mixtral", {}),
    "label smoothing": ("moe_trainer", "mixtral", {"label_smoothing_factor": 0.1}),
    "joint statistics": ("moe_trainer", "ours", {"balance_loss_scope": "global_batch"}),
    "labels of tokens": ("moe_trainer", "ours tokens", {}),
    "labels of tokens, stock": ("stock", "ours tokens", {}),
    "labels of tokens, mixtral": ("added", "mixtral tokens", {}),
}
# Those that two processes run too.
SHARED = ("ours", "mixtral", "ours in a stock Trainer", "mixtral with add_router_losses", "labels of tokens")


def unlabelled_rows(pattern: tuple[int, ...] = PATTERN, highest: int = 113) -> Dataset:
    """A row of ids for each entry, whose labels are all -100 where it is 0; labels below `highest`."""
    ids = random_ids(len(pattern), 16)
    labels = torch.where(torch.tensor(pattern)[:, None] == 1, ids % highest, -100)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()})


def model_of(kind: str) -> nn.Module:
    """A tiny model of a family and a head, with strong router losses."""
    if kind == "dense":
        return tiny_dense("llama")
    family, _, head = kind.partition(" ")
    model = tiny_moe(family, router_aux_loss_coef=1.0)
    if not head:
        return model
    torch.manual_seed(0)
    model.config.num_labels = 3
    heads = {"ours": MoEForTokenClassification, "mixtral": MixtralForTokenClassification}
    model = heads[family](model.config)
    model.dropout.p = 0.0
    return model


class Warned(logging.Handler):
    """Counts how often it is said that there is nothing to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count it."""
        self.count += "nothing to learn" in record.getMessage()

    def __enter__(self) -> "Warned":
        logging.getLogger("moe_hf").addHandler(self)
        return self

    def __exit__(self, *_) -> None:
        logging.getLogger("moe_hf").removeHandler(self)


class Norms(TrainerCallback):
    """Keeps the largest entry of the gradients of each step."""

    def __init__(self) -> None:
        self.largest: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        """Look before the optimizer does."""
        gradients = [p.grad.abs().max() for p in model.parameters() if p.grad is not None]
        self.largest.append(float(torch.stack(gradients).max()))


def trainer_of(way: str, model: nn.Module, args: TrainingArguments, **kwargs) -> Trainer:
    """Our trainer, a stock one, or a stock one with our router losses."""
    trainer = (moe_hf.MoETrainer if way == "moe_trainer" else Trainer)(model, args, **kwargs)
    if way == "added":
        moe_hf.add_router_losses(trainer)
    return trainer


def run(name: str, folder: Path) -> dict[str, Any]:
    """Three steps of four rows of a run, over all processes: its losses, gradients, weights and warnings."""
    way, kind, fields = RUNS[name]
    norms = Norms()
    fields = {
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4 // int(os.environ.get("WORLD_SIZE", 1)),
        "train_sampling_strategy": "sequential",
    } | fields
    data = unlabelled_rows(highest=3 if kind.endswith("tokens") else 113)
    with Warned() as warned:
        trainer = trainer_of(way, model_of(kind), arguments(folder, **fields), train_dataset=data, callbacks=[norms])
        trainer.train()
    return {
        "losses": losses(trainer),
        "largest": norms.largest,
        "weights": {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()},
        "warnings": warned.count,
    }


def packed(way: str, kind: str, folder: Path) -> dict[str, Any]:
    """The same in TRL's SFTTrainer, which packs; it drops rows without labels where it does not."""
    from trl import SFTConfig, SFTTrainer

    from moe_hf.trainer.trl_trainers import MoESFTConfig, MoESFTTrainer

    given = vars(arguments(folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2))
    names = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "logging_steps", "use_cpu")
    names += ("output_dir", "save_strategy", "report_to", "disable_tqdm", "dataloader_pin_memory", "max_grad_norm")
    fields = {name: given[name] for name in names} | {"train_sampling_strategy": "sequential", "bf16": False}
    fields |= {"packing": True, "max_length": 16}
    config = MoESFTConfig(**fields, assistant_only_loss=False) if way == "moe_trainer" else SFTConfig(**fields)
    norms, cls = Norms(), MoESFTTrainer if way == "moe_trainer" else SFTTrainer
    data = unlabelled_rows(highest=17)
    with Warned() as warned:
        trainer = cls(model_of(kind), config, train_dataset=data, processing_class=word_tokenizer(), callbacks=[norms])
        if way == "added":
            moe_hf.add_router_losses(trainer)
        trainer.train()
    return {"losses": losses(trainer), "largest": norms.largest, "warnings": warned.count}
