"""Dense checkpoint -> MoE model: initialise the experts from the dense MLPs, and prove what changed."""

from moe_hf.upcycling.upcycle import upcycle
from moe_hf.upcycling.verification import EXACT_TOLERANCE, VerificationResult, verify


__all__ = ["EXACT_TOLERANCE", "VerificationResult", "upcycle", "verify"]
