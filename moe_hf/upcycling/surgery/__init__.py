"""Operations on trained MoEs: more, fewer or other experts, fewer layers, and back to a dense model."""

from moe_hf.upcycling.surgery.layers import drop_layers
from moe_hf.upcycling.surgery.operations import add_experts, grow_experts, remove_experts, replace_experts
from moe_hf.upcycling.surgery.to_dense import to_dense


__all__ = ["add_experts", "drop_layers", "grow_experts", "remove_experts", "replace_experts", "to_dense"]
