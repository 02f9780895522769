"""One training step of a trainer whose traces are all taken back: random numbers, gradients, buffers, what was counted.

Letters: B batch, S sequence.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from moe_hf.finetuning.router_watch import transformer_of
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.trainer.router_losses import RouterLosses


@dataclass
class DryStep:
    """What a step that was taken back gave.

    Attributes:
        batch: the first batch, on the device.
        loss: of the trainer's own `compute_loss`.
        gradients: by name, the norm of each parameter's gradient, None where it got none.
        expert_gradients: by name of a stacked parameter, the norm for each expert, (E,).
        router_losses: the unweighted router losses that the trainer saw, by name.
        without_router_losses: by name of a router's parameter, the gradient of the loss of the language model alone.
        with_router_losses: the same of the trainer's whole loss.
    """

    batch: dict[str, Any]
    loss: float
    gradients: dict[str, float | None] = field(default_factory=dict)
    expert_gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    router_losses: dict[str, float] = field(default_factory=dict)
    without_router_losses: dict[str, torch.Tensor] = field(default_factory=dict)
    with_router_losses: dict[str, torch.Tensor] = field(default_factory=dict)


@contextmanager
def taken_back(trainer: Trainer) -> Iterator[None]:
    """Put back what a step moves: random numbers, gradients, buffers, the mode, what the trainer noted."""
    model = trainer.model
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    gradients = {name: p.grad for name, p in model.named_parameters()}
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers() if not buffer.is_meta}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim == 1 and not p.requires_grad}
    training, steps = model.training, getattr(trainer, "current_gradient_accumulation_steps", None)
    try:
        for parameter in model.parameters():
            parameter.grad = None
        yield
    finally:
        own = getattr(trainer, "router_losses", None)
        if own is not None:
            own.stop()
            own.next_step()
        logs = getattr(trainer, "_routing_logs", None)
        if logs is not None:
            logs.take()
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name]
            if name in frozen:
                parameter.data.copy_(frozen[name])
        for name, buffer in model.named_buffers():
            if name in buffers:
                buffer.data.copy_(buffers[name])
        model.train(training)
        if steps is not None:
            trainer.current_gradient_accumulation_steps = steps
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)


def dry_step(trainer: Trainer, router_names: list[str]) -> DryStep:
    """Run the first batch forward and backward, twice where there are routers that train; nothing is left of it.

    Args:
        router_names: parameters of routers that train.
    """
    with taken_back(trainer):
        model = trainer.model.train()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        samples, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
        batch = trainer._prepare_inputs(samples[0])
        seed = torch.initial_seed()
        torch.manual_seed(seed)
        loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
        step = DryStep(batch, float(loss.detach()))
        loss.backward()
        own = getattr(trainer, "router_losses", None)
        if own is not None:
            step.router_losses = {name: float(value.detach()) for name, value in own.reported.items()}
        _note(step, model, router_names)
        if router_names:
            _without_router_losses(step, trainer, model, batch, router_names, seed)
        return step


def _note(step: DryStep, model: nn.Module, router_names: list[str]) -> None:
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        grad = parameter.grad
        step.gradients[name] = None if grad is None else float(grad.float().norm())
        if grad is not None and grad.ndim == 3:
            step.expert_gradients[name] = grad.float().flatten(1).norm(dim=1).cpu()
        if name in router_names and grad is not None:
            step.with_router_losses[name] = grad.detach().float().clone()


def _without_router_losses(
    step: DryStep, trainer: Trainer, model: nn.Module, batch: dict, router_names: list[str], seed: int
) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(seed)
    own = getattr(trainer, "router_losses", None) or RouterLosses(model)
    own.stop()
    with own.silenced():
        names = {"input_ids", "attention_mask", "position_ids", "labels"}
        outputs = model(**{name: value for name, value in batch.items() if name in names})
    if outputs.loss is None:
        return
    added = getattr(outputs, "aux_loss", None) if isinstance(transformer_of(model).config, MoEConfig) else None
    # Ours adds them itself, weighted.
    (outputs.loss if added is None else outputs.loss - added).backward()
    for name, parameter in model.named_parameters():
        if name in router_names and parameter.grad is not None:
            step.without_router_losses[name] = parameter.grad.detach().float().clone()
