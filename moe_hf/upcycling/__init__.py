"""Dense checkpoint -> MoE model: initialise the experts from the dense MLPs, prove what changed, operate on the result."""

from moe_hf.upcycling.probe import RoutingProbe, probe_routing
from moe_hf.upcycling.surgery import add_experts, drop_layers, grow_experts, remove_experts, replace_experts, to_dense
from moe_hf.upcycling.upcycle import upcycle
from moe_hf.upcycling.verification import EXACT_TOLERANCE, VerificationResult, verify


__all__ = [
    "EXACT_TOLERANCE",
    "RoutingProbe",
    "VerificationResult",
    "add_experts",
    "drop_layers",
    "grow_experts",
    "probe_routing",
    "remove_experts",
    "replace_experts",
    "to_dense",
    "upcycle",
    "verify",
]
