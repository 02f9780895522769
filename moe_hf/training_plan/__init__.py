"""What fine-tuning a MoE needs on each device, before a device is rented; and the MoE that a given memory holds."""

from moe_hf.training_plan.fit import FittedShape, fit_shape
from moe_hf.training_plan.plan import TrainingPlan, plan_training


__all__ = ["FittedShape", "TrainingPlan", "fit_shape", "plan_training"]
