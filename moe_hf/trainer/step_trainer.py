"""What happens in a training step of `MoETrainer`: router losses, groups of parameters, the guard, telemetry."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from moe_hf.finetuning.scopes import find_moe_blocks
from moe_hf.modeling.losses import sum_over_ranks
from moe_hf.modeling.step_labels import zero_without_labels
from moe_hf.trainer.arguments import MoETrainingArguments
from moe_hf.trainer.expert_balance import add_balance_callback
from moe_hf.trainer.expert_dropout import ExpertDropoutCallback
from moe_hf.trainer.full_eval import full_eval
from moe_hf.trainer.guard import check_finite
from moe_hf.trainer.parameter_groups import PartRates, leave_idle_experts_alone, split_groups
from moe_hf.trainer.router_losses import RouterLosses
from moe_hf.trainer.routing_logs import RoutingLogs
from moe_hf.trainer.telemetry import RoutingTelemetryCallback
from moe_hf.trainer.trainer_losses import (
    RouterLossesCallback,
    begin_watching,
    check_trainer,
    labels_of,
    labels_of_batch,
    labels_to_divide_by,
    loss_for_trainer,
)


# What MoEs return of their routers, this package's and those of transformers.
OF_ROUTERS = ("aux_loss", "z_loss", "router_logits", "router_probs", "router_losses", "router_stats")


class StepTrainer(Trainer):
    """`Trainer` whose steps suit a MoE, as `MoETrainer` describes it."""

    def __init__(self, *args, **kwargs) -> None:
        self._routing_logs, self._step_losses = RoutingLogs(), []
        self._num_lost: torch.Tensor | float = 0.0
        self.router_losses: RouterLosses | None = None
        _choose_form_of_metrics(kwargs.get("args"), kwargs.get("compute_metrics"))
        super().__init__(*args, **kwargs)
        own = self.args if isinstance(self.args, MoETrainingArguments) else None
        self._rates = own.part_rates() if own is not None else PartRates()
        self.follow(self.model)

    def follow(self, model: nn.Module) -> None:
        """Watch the labels and the routers of the model that is trained from now on."""
        begin_watching(model)
        own = self.args if isinstance(self.args, MoETrainingArguments) else None
        self.pop_callback(RouterLossesCallback)
        self.router_losses = None
        if not find_moe_blocks(model):
            return
        self.router_losses = RouterLosses(model, **(own.router_loss_arguments() if own is not None else {}))
        check_trainer(self.router_losses, self)
        self.router_losses.stop()
        self.add_callback(RouterLossesCallback(self.router_losses))
        add_balance_callback(self, model)
        telemetry = "off" if own is None else own.routing_telemetry
        if telemetry != "off" and not self._has_callback(RoutingTelemetryCallback):
            self.add_callback(RoutingTelemetryCallback(detailed=telemetry == "detailed"))
        if own is not None and own.expert_dropout and not self._has_callback(ExpertDropoutCallback):
            self.add_callback(ExpertDropoutCallback(own.expert_dropout))

    def _has_callback(self, kind: type) -> bool:
        return any(isinstance(callback, kind) for callback in self.callback_handler.callbacks)

    def get_batch_samples(self, *args, **kwargs) -> tuple[list, torch.Tensor | int | None]:
        """As `Trainer.get_batch_samples`; a step without a label counts 0, whatever divides by the number of labels."""
        samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        return samples, labels_to_divide_by(self, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs):
        """As `Trainer.compute_loss`; in training with the router losses, which are also kept for the next log.

        Without a label to learn from the loss is 0, and NaN in evaluation, which leaves it out of the mean.
        """
        labels, is_step = labels_of(inputs, self), model.training and torch.is_grad_enabled()
        num_items_in_batch = kwargs.get("num_items_in_batch")
        num_labels = labels_of_batch(inputs, self, num_items_in_batch)
        if is_step and self.router_losses is not None:
            self.router_losses.start()
        with nullcontext() if self.router_losses is None else self.router_losses.silenced():
            result = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        loss, outputs = result if return_outputs else (result, None)
        loss = zero_without_labels(loss, num_labels) if is_step else self._evaluated(loss, num_labels)
        if is_step and self.router_losses is not None:
            loss = loss + loss_for_trainer(self.router_losses, self, labels, num_items_in_batch)
            self._routing_logs.add(self.router_losses.reported, self.router_losses.stats)
        return (loss, outputs) if return_outputs else loss

    def _evaluated(self, loss: torch.Tensor, num_labels: torch.Tensor | None) -> torch.Tensor:
        """The loss of a batch of an evaluation, NaN where it has no labels; one that is lost otherwise is noted."""
        is_empty = torch.zeros_like(loss, dtype=torch.bool) if num_labels is None else num_labels.to(loss.device) == 0
        self._num_lost = self._num_lost + (~is_empty & ~loss.isfinite()).sum()
        return torch.where(is_empty, torch.full_like(loss, torch.nan), loss)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`; batches without labels are no part of the mean loss, those that are lost are.

        Predictions are what the head returns; what the model says of its routers is none. In 16 bits, where that is asked for,
        the weights are rounded for this time alone.
        """
        if ignore_keys is None:
            ignore_keys = [*getattr(self.model.config, "keys_to_ignore_at_inference", ()), *OF_ROUTERS]
        asked, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, True
        self._num_lost = torch.zeros(1, device=self.args.device)
        try:
            with full_eval(self):
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
        finally:
            self.args.logging_nan_inf_filter = asked
        (lost,) = sum_over_ranks([self._num_lost])
        if lost:
            output.metrics[f"{metric_key_prefix}_loss"] = float("nan")
        return output

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As `Trainer.training_step`; the loss is kept until it was found to be finite."""
        loss = super().training_step(*args, **kwargs)
        self._step_losses.append(loss)
        return loss

    def _clip_grad_norm(self, model: nn.Module):
        # Clipping spreads a NaN over all gradients.
        self._check_step()
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm=None):
        if grad_norm is None:
            self._check_step()
        return super()._get_grad_norm(model, grad_norm)

    def _check_step(self) -> None:
        """Stop before the optimizer step if a loss or a gradient of it is not finite."""
        losses, self._step_losses = self._step_losses, []
        # A scaler skips the steps whose gradients overflow, and DeepSpeed keeps gradients to itself.
        reads = self.accelerator.scaler is None and not self.is_deepspeed_enabled
        check_finite(self.model, self.state.global_step + 1, losses, gradients=reads)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As `Trainer.create_optimizer`; routers and experts in groups of their own where they have their own rates."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        trained = self.model if model is None else model
        if is_new and self._rates.is_given():
            optimizer.param_groups = split_groups(
                optimizer.param_groups, trained, self._rates, set(self.get_decay_parameter_names(trained))
            )
        if is_new and getattr(self.args, "skip_idle_experts", False):
            leave_idle_experts_alone(optimizer, trained)
        return optimizer

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log; a training log also has the unweighted router losses, the routers' figures and the parts' rates.

        Means over the micro-batches of all processes since the last log.
        """
        if "loss" in logs:
            logs |= self._routing_logs.take() | self._part_learning_rates()
        super().log(logs, *args, **kwargs)

    def _part_learning_rates(self) -> dict[str, float]:
        groups = self.optimizer.param_groups if self._rates.is_given() and self.optimizer is not None else []
        return {f"learning_rate_{group['part']}": float(group["lr"]) for group in groups if group["part"] != "rest"}


def _choose_form_of_metrics(args: TrainingArguments | None, compute_metrics: Callable | None) -> None:
    """Let a function of the usual form see the whole evaluation at once; one that takes `compute_result` sees batches."""
    if compute_metrics is not None and "compute_result" not in inspect.signature(compute_metrics).parameters:
        args.batch_eval_metrics = False
