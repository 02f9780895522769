"""Operations on trained MoEs: more, fewer or other experts, and back to a dense model."""

from moe_hf.upcycling.surgery.operations import add_experts, grow_experts, remove_experts, replace_experts
from moe_hf.upcycling.surgery.to_dense import to_dense


__all__ = ["add_experts", "grow_experts", "remove_experts", "replace_experts", "to_dense"]
