"""States that a model can train in, and how each way to keep a model treats them: the table of `test_kept`."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

import moe_hf
from moe_hf.finetuning.trained_tensors import named_tensors
from moe_hf.trainer import MoETrainer, MoETrainingArguments
from tests.trainer.runs import arguments, rows, tiny_moe


# What a way to keep a model leaves. WHOLE: from_pretrained gives the model. PEFT: PEFT's adapters, for its loaders. REFUSED: one
# sentence, and save_trained does what it says.
WHOLE, PEFT, REFUSED = "whole", "adapters of PEFT", "refused"
# What a checkpoint holds.
ALL, ADAPTERS, LORA, DELTAS, NAMED, LORA_NAMED = (
    {"model.safetensors"},
    {"adapter_config.json"},
    {"expert_lora.safetensors"},
    {"expert_deltas.safetensors"},
    {"trained_parameters.safetensors"},
    {"expert_lora.safetensors", "trained_parameters.safetensors"},
)
EXPERTS = {"0": [1], "2": [0, 3]}


@dataclass(frozen=True)
class State:
    """One row: how the model is prepared, the trainer's own fields, and the outcome of each column, written by hand."""

    prepare: Callable[[nn.Module], nn.Module]
    checkpoint: set[str]
    save_model: str
    save_pretrained: str
    hub: str
    fields: dict[str, Any] = field(default_factory=dict)
    classifies: bool = False


def peft_on_attention(model: nn.Module, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"], **fields))


def expert_lora(model: nn.Module) -> nn.Module:
    return moe_hf.add_expert_lora(model, moe_hf.ExpertLoraConfig(r=2, alpha=8))


def in_place(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    return model


def routers_freed(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            parameter.requires_grad_(True)
    return model


def head_freed(model: nn.Module) -> nn.Module:
    model.score.weight.requires_grad_(True)
    return model


def module_by_hand(model: nn.Module) -> nn.Module:
    """Nobody would look for its weights in a checkpoint of this class."""
    torch.manual_seed(0)
    model.requires_grad_(False)
    model.get_input_embeddings().register_parameter("shift", nn.Parameter(torch.randn(48)))
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output + module.shift)
    return model


STATES = {
    "bare": State(lambda m: m, ALL, WHOLE, WHOLE, WHOLE, {"scope": "moe"}),
    "peft": State(peft_on_attention, ADAPTERS, PEFT, PEFT, PEFT),
    "peft-scope": State(peft_on_attention, NAMED, WHOLE, REFUSED, WHOLE, {"scope": "moe"}),
    "peft-in-place": State(in_place, NAMED, PEFT, PEFT, PEFT),
    "expert-lora": State(expert_lora, LORA, WHOLE, REFUSED, WHOLE),
    "expert-lora-peft": State(lambda m: expert_lora(peft_on_attention(m)), LORA_NAMED, WHOLE, REFUSED, WHOLE),
    "selected": State(lambda m: m, DELTAS, WHOLE, WHOLE, WHOLE, {"scope": "selected", "expert_selection": EXPERTS}),
    "freed-by-hand": State(lambda m: routers_freed(m.requires_grad_(False)), ALL, WHOLE, WHOLE, WHOLE),
    "freed-beside-lora": State(lambda m: routers_freed(expert_lora(m)), LORA_NAMED, WHOLE, REFUSED, WHOLE),
    "freed-beside-peft": State(lambda m: routers_freed(peft_on_attention(m)), NAMED, WHOLE, REFUSED, WHOLE),
    "new-head": State(lambda m: head_freed(expert_lora(m)), LORA_NAMED, WHOLE, REFUSED, WHOLE, classifies=True),
    "new-head-peft": State(
        lambda m: peft_on_attention(m, task_type="SEQ_CLS"), ADAPTERS, PEFT, PEFT, PEFT, classifies=True
    ),
    "modules-to-save": State(lambda m: peft_on_attention(m, modules_to_save=["lm_head"]), ADAPTERS, PEFT, PEFT, PEFT),
    "added-by-hand": State(module_by_hand, NAMED, REFUSED, REFUSED, REFUSED),
}


class BestIsFirst(TrainerCallback):
    """Makes the first checkpoint the best one, and keeps what the model holds then, by name."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
        metrics["eval_score"] = -float(state.global_step)

    def on_save(self, args, state, control, model=None, **kwargs) -> None:
        if not self.first:
            model.state_dict()
            self.first = {name: tensor.detach().clone() for name, tensor in named_tensors(model).items()}


def base_model(state: State, kind: str, folder: Path) -> nn.Module:
    """A tiny MoE that was saved and loaded, as adapters need it: `folder` is its name."""
    if not folder.exists():
        tiny_moe(kind).save_pretrained(folder)
    if not state.classifies:
        return AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, pad_token_id=0)


def prepared(state: State, kind: str, folder: Path) -> nn.Module:
    """The model as a user gives it to a trainer; always the same numbers."""
    return state.prepare(base_model(state, kind, folder))


def train(
    state: State, kind: str, folder: Path, output: Path, max_steps: int = 2, resume: Path | None = None
) -> MoETrainer:
    """Two steps that change what trains by much, a checkpoint after each; the first is the best and is loaded at the end."""
    data = rows(8)
    if state.classifies:
        data = data.remove_columns("labels").add_column("labels", [i % 3 for i in range(8)])
    fields = {"max_steps": max_steps, "learning_rate": 0.05, "per_device_train_batch_size": 4, "weight_decay": 0.0}
    fields |= {"save_strategy": "steps", "save_steps": 1} | state.fields
    if resume is None:
        fields |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
        fields |= {"metric_for_best_model": "score", "greater_is_better": True}
    args: MoETrainingArguments = arguments(output, **fields)
    watch = BestIsFirst()
    trainer = MoETrainer(prepared(state, kind, folder), args, train_dataset=data, eval_dataset=data, callbacks=[watch])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.best = watch.first
    return trainer
