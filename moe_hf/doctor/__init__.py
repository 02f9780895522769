"""What was lost without a word: of checkpoints, adapters, quantized folders, runs, trainers, and the environment."""

from moe_hf.doctor.codes import CODES
from moe_hf.doctor.environment import examine_environment
from moe_hf.doctor.examine import examine
from moe_hf.doctor.findings import Finding, Report
from moe_hf.doctor.trainers import examine_trainer


__all__ = ["CODES", "Finding", "Report", "examine", "examine_environment", "examine_trainer"]
