"""Which parameters train when a MoE is fine-tuned."""

from moe_hf.finetuning.expert_deltas import ExpertDeltas, load_expert_deltas, save_expert_deltas
from moe_hf.finetuning.expert_lora import (
    add_expert_lora,
    lora_adapters,
    merge_expert_lora,
    remove_expert_lora,
    unmerge_expert_lora,
)
from moe_hf.finetuning.expert_scores import ExpertScores, score_experts
from moe_hf.finetuning.expert_selection import ExpertSelection, select_experts
from moe_hf.finetuning.lora_config import ExpertLoraConfig
from moe_hf.finetuning.lora_files import load_expert_lora, save_expert_lora
from moe_hf.finetuning.moe_blocks import find_moe_blocks
from moe_hf.finetuning.scopes import SCOPES, ScopeReport, apply_scope, scope_parameter_names
from moe_hf.finetuning.selected_experts import merge_selected_experts
from moe_hf.finetuning.trained_files import load_trained, save_trained


__all__ = [
    "SCOPES",
    "ExpertDeltas",
    "ExpertLoraConfig",
    "ExpertScores",
    "ExpertSelection",
    "ScopeReport",
    "add_expert_lora",
    "apply_scope",
    "find_moe_blocks",
    "load_expert_deltas",
    "load_expert_lora",
    "load_trained",
    "lora_adapters",
    "merge_expert_lora",
    "merge_selected_experts",
    "remove_expert_lora",
    "save_expert_deltas",
    "save_expert_lora",
    "save_trained",
    "scope_parameter_names",
    "score_experts",
    "select_experts",
    "unmerge_expert_lora",
]
