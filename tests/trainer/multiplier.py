"""How strongly router losses act: their gradient in a training step, for four ways to train."""

import os
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Trainer
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import moe_hf
from tests.tiny_models import random_ids
from tests.trainer.runs import GradientRecorder, arguments, tiny_moe


HAS_TRL = find_spec("trl") is not None
WAYS = ("moe_trainer", "raw_loop", "sft_trainer", "dpo_trainer")
MODELS = ("ours", "mixtral")
ACCUMULATIONS = (1, 2, 4, 8)
COEFFICIENT = 2.0


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, within the tiny models' vocabulary of 113."""
    words = ["<eos>", "<unk>", *"abcdefghij", "the", "of", "class"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")


def model_with(kind: str, coefficient: float) -> PreTrainedModel:
    """A tiny MoE whose load-balancing loss has this coefficient, and whose other router losses have none."""
    fields = {"router_z_loss_coef": 0.0} if kind == "ours" else {}
    return tiny_moe(kind, router_aux_loss_coef=coefficient, **fields)


def router_gradient(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient of all routers, flat."""
    return torch.cat([gradient.flatten() for name, gradient in gradients.items() if name.endswith("gate.weight")])


def expected_gradient(kind: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient of the coefficient times the load-balancing loss of one batch, the mean over layers, in float32.

    For Mixtral from transformers' own function, one layer at a time, which is the strength that its coefficient has there.
    """
    model = model_with(kind, COEFFICIENT).train()
    mask = batch.get("attention_mask")
    outputs = model(batch["input_ids"], attention_mask=mask, output_router_logits=True)
    if kind == "ours":
        loss = COEFFICIENT * outputs.router_losses["load_balancing_loss"]
    else:
        layers = [load_balancing_loss_func((logits,), 4, 2, mask) for logits in outputs.router_logits]
        loss = COEFFICIENT * sum(layers) / len(layers)
    loss.backward()
    return router_gradient({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def trainer_of(way: str, model: PreTrainedModel, folder: Path, accumulation: int, rows: int) -> Trainer:
    """A trainer of one step over identical rows, a row per micro-batch and process."""
    fields = {
        "max_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": accumulation,
        "weight_decay": 0.0,
    }
    if way == "moe_trainer":
        ids = random_ids(1, 16).tolist() * rows
        dataset = Dataset.from_dict({"input_ids": ids, "labels": ids})
        return moe_hf.MoETrainer(model, arguments(folder, **fields), train_dataset=dataset)
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    quiet = {"max_grad_norm": 0.0, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    quiet |= {"output_dir": str(folder), "bf16": False, "gradient_checkpointing": False, "logging_steps": 1}
    if way == "sft_trainer":
        dataset = Dataset.from_dict({"input_ids": random_ids(1, 16).tolist() * rows})
        config = SFTConfig(**fields, **quiet)
        return SFTTrainer(model, args=config, train_dataset=dataset, processing_class=word_tokenizer())
    pair = {"prompt": "a b c d", "chosen": " e f g h the of class a", "rejected": " i j a"}
    dataset = Dataset.from_dict({name: [text] * rows for name, text in pair.items()})
    return DPOTrainer(
        model,
        ref_model=model_with("mixtral", 0.0),
        args=DPOConfig(**fields, **quiet),
        train_dataset=dataset,
        processing_class=word_tokenizer(),
    )


def trained(way: str, kind: str, coefficient: float, accumulation: int, folder: Path) -> tuple[torch.Tensor, dict]:
    """The routers' gradient in one training step on identical rows, and the batch of one micro-batch."""
    model = model_with(kind, coefficient)
    if way == "raw_loop":
        return raw_loop(model, accumulation)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    trainer = trainer_of(way, model, folder, accumulation, rows=accumulation * world_size)
    assert trainer.accelerator.num_processes == world_size
    if way != "moe_trainer":
        moe_hf.add_router_losses(trainer)
    recorder = GradientRecorder()
    trainer.add_callback(recorder)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.train()
    return router_gradient(recorder.gradients), batch


def raw_loop(model: PreTrainedModel, accumulation: int) -> tuple[torch.Tensor, dict]:
    """One step of a loop of one's own with Accelerate, as the documentation has it."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    router_losses = moe_hf.RouterLosses(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    unwrapped = model
    model, optimizer = accelerator.prepare(model, optimizer)
    model.train()
    batch = {"input_ids": random_ids(1, 16), "labels": random_ids(1, 16)}
    micro_batches = [batch] * accumulation
    count = sum((batch["labels"][..., 1:] != -100).sum() for batch in micro_batches)
    count = accelerator.reduce(count, "sum")
    scale = accumulation * accelerator.num_processes
    for micro_batch in micro_batches:
        with accelerator.accumulate(model):
            loss = model(**micro_batch, num_items_in_batch=count).loss
            loss = loss + router_losses.loss(micro_batch["labels"], count)
            accelerator.backward(loss * scale)
            optimizer.step()
    router_losses.next_step()
    return router_gradient({name: p.grad for name, p in unwrapped.named_parameters()}), batch


def multipliers(way: str, kind: str, accumulations: tuple[int, ...], folder: Path) -> dict[int, tuple[float, float]]:
    """By accumulation: the multiplier of the coefficient, and the relative error of the gradient."""
    without, batch = trained(way, kind, 0.0, 1, folder / "without")
    expected = expected_gradient(
        kind, {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    )
    found = {}
    for accumulation in accumulations:
        with_losses, _ = trained(way, kind, COEFFICIENT, accumulation, folder / f"with_{accumulation}")
        added = with_losses - without
        multiplier = float(added @ expected / (expected @ expected))
        found[accumulation] = (multiplier, float((added - expected).norm() / expected.norm()))
    return found
