"""Router losses in the loss of a `Trainer`: what they weigh there, and how any trainer gets them."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from moe_hf.errors import MoEError
from moe_hf.finetuning.adapter_reach import say_what_adapters_leave
from moe_hf.finetuning.router_watch import transformer_of
from moe_hf.modeling.step_labels import LabelWatch, at_least_one, label_watch, number_of_labels, zero_without_labels
from moe_hf.trainer.expert_balance import add_balance_callback
from moe_hf.trainer.router_losses import RouterLosses


class RouterLossesCallback(TrainerCallback):
    """Tells `RouterLosses` when an optimizer step is done, and when training is."""

    def __init__(self, router_losses: RouterLosses) -> None:
        self._router_losses = router_losses

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Forget what a run that was broken off left, as where the batch did not fit."""
        self._router_losses.stop()
        self._router_losses.next_step()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Forget the choices of the step."""
        self._router_losses.next_step()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Leave the model as it was."""
        self._router_losses.stop()


def loss_for_trainer(
    router_losses: RouterLosses,
    trainer: Trainer,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> torch.Tensor | float:
    """What is added to the loss that `trainer.compute_loss` returns in training, so that its coefficient is what it says.

    `Trainer` divides that loss by the accumulation steps, unless it is divided by the labels of the whole step; then it
    was multiplied by the processes, whose gradients are averaged.

    Raises:
        MoEError: no router losses were seen, although there should be some.
    """
    if not router_losses.has_entered and any(router_losses.coefficients.values()):
        raise MoEError(
            "The forward pass of this training step computed no router losses: the loss comes from something else than "
            "the trainer's model. Set the coefficients of the router losses to 0, or let the model compute it."
        )
    is_divided = trainer.loss_is_scaled_for_ga
    if is_divided is None:
        takes_count = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        is_divided = takes_count or trainer.compute_loss_func is not None
    if not is_divided or num_items_in_batch is None or labels is None:
        loss = router_losses.loss(labels, shift_labels=trainer._loss_shifts_labels)
        return loss / trainer.current_gradient_accumulation_steps if is_divided else loss
    loss = router_losses.loss(labels, num_items_in_batch, shift_labels=trainer._loss_shifts_labels)
    if trainer.args.average_tokens_across_devices:
        loss = loss * (trainer.accelerator.num_processes // trainer.get_tp_size())
    return loss


def labels_of(inputs: Mapping, trainer: Trainer) -> torch.Tensor | None:
    """The labels of a batch as `Trainer` counts them: those that the model predicts, and shifts or not."""
    labels = inputs.get("shift_labels")
    if labels is None or not trainer._loss_shifts_labels:
        return inputs.get("labels")
    return torch.nn.functional.pad(labels, (1, 0), value=-100)


def begin_watching(model: nn.Module) -> None:
    """Begin the runs of a trainer, which says once what adapters leave out, and that a step has nothing to learn."""
    say_what_adapters_leave(model)
    vars(transformer_of(model))["_label_watch"] = LabelWatch()


def labels_to_divide_by(trainer: Trainer, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | int | None:
    """The labels of an optimizer step, as a trainer counted them; 1 where there are none, which is said."""
    if num_items_in_batch is not None:
        label_watch(transformer_of(trainer.model)).see(num_items_in_batch)
    return at_least_one(num_items_in_batch)


def labels_of_batch(inputs: Mapping, trainer: Trainer, num_items_in_batch: torch.Tensor | int | None):
    """How many labels a batch has, None where it has no field of them; none is said where it is averaged by itself."""
    number = number_of_labels(inputs, trainer._loss_shifts_labels)
    if number is not None and (num_items_in_batch is None or not trainer.model.training):
        label_watch(transformer_of(trainer.model)).see(number)
    return number


def check_trainer(router_losses: RouterLosses, trainer: Trainer) -> None:
    """Refuse what router losses cannot be right under.

    Raises:
        MoEError: several GPUs in one process, or joint statistics without a joint number of labels.
    """
    if trainer.args.n_gpu > 1 and router_losses._watch is not None:
        raise MoEError(
            f"{trainer.args.n_gpu} GPUs are driven by one process (DataParallel), whose replicas no hook can follow. "
            "Launch with accelerate launch or torchrun, or make one GPU visible."
        )
    if router_losses.is_joint and trainer.args.world_size > 1 and not trainer.args.average_tokens_across_devices:
        raise MoEError(
            "balance_loss_scope='global_batch' needs average_tokens_across_devices=True, the default: a batch of all "
            "processes has one number of labels."
        )


def add_router_losses(
    trainer: Trainer,
    *,
    router_aux_loss_coef: float | None = None,
    router_z_loss_coef: float | None = None,
    balance_loss_scope: str | None = None,
) -> RouterLosses:
    """Let any `Trainer`, also those of TRL, train with the router losses that `RouterLosses` describes.

    TRL's own loss over all layers together is switched off, its `router_aux_loss_coef` is followed. Call it before
    `trainer.train()`; a `MoETrainer` does it by itself.

    Args:
        trainer (`Trainer`): `SFTTrainer`, `DPOTrainer`, ...
        router_aux_loss_coef, router_z_loss_coef, balance_loss_scope: as `RouterLosses` takes them.

    Raises:
        MoEError: it was done already, or what `RouterLosses` refuses.
    """
    if getattr(trainer, "router_losses", None) is not None:
        raise MoEError(f"{type(trainer).__name__} has its router losses already; they must enter once.")
    if router_aux_loss_coef is None:
        router_aux_loss_coef = getattr(trainer.args, "router_aux_loss_coef", None)
    losses = RouterLosses(
        trainer.model,
        router_aux_loss_coef=router_aux_loss_coef,
        router_z_loss_coef=router_z_loss_coef,
        balance_loss_scope=balance_loss_scope,
    )
    check_trainer(losses, trainer)
    losses.stop()
    if hasattr(trainer, "aux_loss_enabled"):
        trainer.aux_loss_enabled = False
        losses.model.config.get_text_config().output_router_logits = False
    begin_watching(trainer.model)
    compute_loss, get_batch_samples = trainer.compute_loss, trainer.get_batch_samples

    def with_labels(*args, **kwargs):
        samples, num_items_in_batch = get_batch_samples(*args, **kwargs)
        return samples, labels_to_divide_by(trainer, num_items_in_batch)

    def with_router_losses(model: PreTrainedModel, inputs: dict, return_outputs: bool = False, **kwargs):
        labels, is_step = labels_of(inputs, trainer), model.training and torch.is_grad_enabled()
        num_items_in_batch = kwargs.get("num_items_in_batch")
        if is_step:
            num_labels = labels_of_batch(inputs, trainer, num_items_in_batch)
            losses.start()
        with losses.silenced():
            result = compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        if not is_step:
            return result
        loss, outputs = result if return_outputs else (result, None)
        loss = zero_without_labels(loss, num_labels)
        loss = loss + loss_for_trainer(losses, trainer, labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    trainer.router_losses, trainer.compute_loss = losses, with_router_losses
    trainer.get_batch_samples = with_labels
    trainer.add_callback(RouterLossesCallback(losses))
    add_balance_callback(trainer, trainer.model)
    return losses
