"""Training: `MoETrainer`, its arguments and its checkpoints."""

from moe_hf.trainer.arguments import MoETrainingArguments
from moe_hf.trainer.moe_trainer import MoETrainer


__all__ = ["MoETrainer", "MoETrainingArguments"]
