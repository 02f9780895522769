"""Training: `MoETrainer`, its arguments and its checkpoints; its parts, for other trainers and loops of one's own."""

from moe_hf.trainer.arguments import MoETrainingArguments
from moe_hf.trainer.capacity_schedule import CapacitySchedule, CapacityScheduleCallback
from moe_hf.trainer.deepspeed import loaded_whole
from moe_hf.trainer.early_stopping import HeldOutGapCallback
from moe_hf.trainer.expert_balance import (
    ExpertBalanceCallback,
    start_counting,
    update_correction_bias,
    update_router_state,
)
from moe_hf.trainer.expert_dropout import ExpertDropoutCallback, add_expert_dropout
from moe_hf.trainer.guard import FiniteGuardCallback, check_finite
from moe_hf.trainer.moe_trainer import MoETrainer
from moe_hf.trainer.parameter_groups import leave_idle_experts_alone, parameter_groups
from moe_hf.trainer.router_losses import RouterLosses
from moe_hf.trainer.telemetry import RoutingTelemetryCallback
from moe_hf.trainer.trainer_losses import add_router_losses


__all__ = [
    "CapacitySchedule",
    "CapacityScheduleCallback",
    "ExpertBalanceCallback",
    "ExpertDropoutCallback",
    "FiniteGuardCallback",
    "HeldOutGapCallback",
    "MoETrainer",
    "MoETrainingArguments",
    "RouterLosses",
    "RoutingTelemetryCallback",
    "add_expert_dropout",
    "add_router_losses",
    "check_finite",
    "leave_idle_experts_alone",
    "loaded_whole",
    "parameter_groups",
    "start_counting",
    "update_correction_bias",
    "update_router_state",
]
