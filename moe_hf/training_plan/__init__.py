"""What fine-tuning a MoE needs on each device, before a device is rented."""

from moe_hf.training_plan.plan import TrainingPlan, plan_training


__all__ = ["TrainingPlan", "plan_training"]
