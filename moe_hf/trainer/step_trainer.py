"""What happens in a training step of `MoETrainer`: router losses, groups of parameters, the guard, telemetry."""

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from moe_hf.finetuning.scopes import find_moe_blocks
from moe_hf.trainer.arguments import MoETrainingArguments
from moe_hf.trainer.expert_balance import add_balance_callback
from moe_hf.trainer.expert_dropout import ExpertDropoutCallback
from moe_hf.trainer.guard import check_finite
from moe_hf.trainer.parameter_groups import PartRates, leave_idle_experts_alone, split_groups
from moe_hf.trainer.router_losses import RouterLosses
from moe_hf.trainer.routing_logs import RoutingLogs
from moe_hf.trainer.telemetry import RoutingTelemetryCallback
from moe_hf.trainer.trainer_losses import RouterLossesCallback, check_trainer, labels_of, loss_for_trainer


class StepTrainer(Trainer):
    """`Trainer` whose steps suit a MoE, as `MoETrainer` describes it."""

    def __init__(self, *args, **kwargs) -> None:
        self._routing_logs, self._step_losses = RoutingLogs(), []
        self.router_losses: RouterLosses | None = None
        super().__init__(*args, **kwargs)
        own = self.args if isinstance(self.args, MoETrainingArguments) else None
        self._rates = own.part_rates() if own is not None else PartRates()
        if not find_moe_blocks(self.model):
            return
        self.router_losses = RouterLosses(self.model, **(own.router_loss_arguments() if own is not None else {}))
        check_trainer(self.router_losses, self)
        self.router_losses.stop()
        self.add_callback(RouterLossesCallback(self.router_losses))
        add_balance_callback(self)
        telemetry = "off" if own is None else own.routing_telemetry
        if telemetry != "off" and not self._has_callback(RoutingTelemetryCallback):
            self.add_callback(RoutingTelemetryCallback(detailed=telemetry == "detailed"))
        if own is not None and own.expert_dropout:
            self.add_callback(ExpertDropoutCallback(own.expert_dropout))

    def _has_callback(self, kind: type) -> bool:
        return any(isinstance(callback, kind) for callback in self.callback_handler.callbacks)

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs):
        """As `Trainer.compute_loss`; in training with the router losses, which are also kept for the next log."""
        if self.router_losses is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        labels, is_step = labels_of(inputs, self), model.training and torch.is_grad_enabled()
        if is_step:
            self.router_losses.start()
        with self.router_losses.silenced():
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if is_step:
            loss = loss + loss_for_trainer(self.router_losses, self, labels, kwargs.get("num_items_in_batch"))
            self._routing_logs.add({"router_losses": self.router_losses.reported})
            if isinstance(outputs, dict):
                self._routing_logs.add({"router_stats": outputs.get("router_stats")})
        return (loss, outputs) if return_outputs else loss

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
