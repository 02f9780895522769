"""A model beside its dense control: the same text, each at its own rate, over seeds, with what it cost and an interval."""

from moe_hf.trainer.comparison.arms import ComparisonArguments
from moe_hf.trainer.comparison.report import print_comparison
from moe_hf.trainer.comparison.runs import train_beside_control


__all__ = ["ComparisonArguments", "print_comparison", "train_beside_control"]
