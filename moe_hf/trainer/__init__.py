"""Training: `MoETrainer`, its arguments and its checkpoints."""

from moe_hf.trainer.arguments import MoETrainingArguments
from moe_hf.trainer.capacity_schedule import CapacitySchedule, CapacityScheduleCallback
from moe_hf.trainer.expert_balance import (
    ExpertBalanceCallback,
    start_counting,
    update_correction_bias,
    update_router_state,
)
from moe_hf.trainer.moe_trainer import MoETrainer


__all__ = [
    "CapacitySchedule",
    "CapacityScheduleCallback",
    "ExpertBalanceCallback",
    "MoETrainer",
    "MoETrainingArguments",
    "start_counting",
    "update_correction_bias",
    "update_router_state",
]
