"""Which parameters train when a MoE is fine-tuned."""

from moe_hf.finetuning.scopes import SCOPES, ScopeReport, apply_scope, find_moe_blocks, scope_parameter_names


__all__ = ["SCOPES", "ScopeReport", "apply_scope", "find_moe_blocks", "scope_parameter_names"]
