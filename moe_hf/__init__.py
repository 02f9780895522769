"""Mixture-of-Experts for Hugging Face Transformers: upcycle a dense causal LM, fine-tune its experts, share it."""

from importlib import import_module

from moe_hf.auto_classes import register_when_loaded
from moe_hf.versions import check_installed_transformers, warn_of_untested_versions


__version__ = "0.2.0"

# Public names and their modules, which are imported when a name is first used: the models need torch, seconds to load.
_MODULES = {
    "CapacitySchedule": "moe_hf.trainer",
    "CapacityScheduleCallback": "moe_hf.trainer",
    "ConvertedSource": "moe_hf.conversion",
    "DomainMixture": "moe_hf.domain_mixture",
    "ExpertBalanceCallback": "moe_hf.trainer",
    "ExpertDropoutCallback": "moe_hf.trainer",
    "ExpertLoraConfig": "moe_hf.finetuning",
    "ExpertScores": "moe_hf.finetuning",
    "ExpertSelection": "moe_hf.finetuning",
    "FiniteGuardCallback": "moe_hf.trainer",
    "HeldOutGapCallback": "moe_hf.trainer",
    "MoEConfig": "moe_hf.modeling.configuration_moe",
    "MoEError": "moe_hf.modeling.configuration_moe",
    "MoEForCausalLM": "moe_hf.modeling.modeling_moe",
    "MoEForSequenceClassification": "moe_hf.modeling.modeling_moe",
    "MoEForTokenClassification": "moe_hf.modeling.modeling_moe",
    "MoEModel": "moe_hf.modeling.modeling_moe",
    "MoETrainer": "moe_hf.trainer",
    "MoETrainingArguments": "moe_hf.trainer",
    "QuantizationScheme": "moe_hf.inference",
    "RouterLosses": "moe_hf.trainer",
    "RoutingTelemetryCallback": "moe_hf.trainer",
    "add_expert_dropout": "moe_hf.trainer",
    "add_expert_lora": "moe_hf.finetuning",
    "add_experts": "moe_hf.upcycling",
    "add_router_losses": "moe_hf.trainer",
    "apply_scope": "moe_hf.finetuning",
    "cache_report": "moe_hf.inference",
    "check_finite": "moe_hf.trainer",
    "convert_source": "moe_hf.conversion",
    "drop_layers": "moe_hf.upcycling",
    "examine": "moe_hf.doctor",
    "examine_environment": "moe_hf.doctor",
    "examine_trainer": "moe_hf.doctor",
    "exact_targets": "moe_hf.interchange",
    "export_native": "moe_hf.interchange",
    "extract_experts": "moe_hf.extraction",
    "fit_shape": "moe_hf.training_plan",
    "grow_experts": "moe_hf.upcycling",
    "import_native": "moe_hf.interchange",
    "inspect_model": "moe_hf.inspection",
    "leave_idle_experts_alone": "moe_hf.trainer",
    "load_expert_deltas": "moe_hf.finetuning",
    "load_expert_lora": "moe_hf.finetuning",
    "load_low_memory": "moe_hf.inference",
    "load_trained": "moe_hf.finetuning",
    "merge_expert_lora": "moe_hf.finetuning",
    "merge_selected_experts": "moe_hf.finetuning",
    "model_bytes": "moe_hf.inference",
    "offload_experts": "moe_hf.inference",
    "parameter_groups": "moe_hf.trainer",
    "plan_training": "moe_hf.training_plan",
    "plan_upcycling": "moe_hf.planning",
    "probe_routing": "moe_hf.upcycling",
    "pull_folder": "moe_hf.hub",
    "push_folder": "moe_hf.hub",
    "quantize_experts": "moe_hf.inference",
    "register_expert": "moe_hf.modeling.extra_experts",
    "register_router": "moe_hf.modeling.routers",
    "remove_expert_lora": "moe_hf.finetuning",
    "remove_experts": "moe_hf.upcycling",
    "replace_experts": "moe_hf.upcycling",
    "restore_experts": "moe_hf.inference",
    "routing_statistics": "moe_hf.reporting.routing_statistics",
    "save_expert_deltas": "moe_hf.finetuning",
    "save_expert_lora": "moe_hf.finetuning",
    "save_trained": "moe_hf.finetuning",
    "save_low_memory": "moe_hf.inference",
    "score_experts": "moe_hf.finetuning",
    "select_experts": "moe_hf.finetuning",
    "start_counting": "moe_hf.trainer",
    "to_dense": "moe_hf.upcycling",
    "unmerge_expert_lora": "moe_hf.finetuning",
    "upcycle": "moe_hf.upcycling",
    "upcycle_checkpoint": "moe_hf.streaming",
    "update_correction_bias": "moe_hf.trainer",
    "update_router_state": "moe_hf.trainer",
    "verify": "moe_hf.upcycling",
}
__all__ = list(_MODULES)


def __getattr__(name: str):
    if f"moe_hf.{name}" in _MODULES.values():
        return import_module(f"moe_hf.{name}")
    if name not in _MODULES:
        raise AttributeError(f"module 'moe_hf' has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


check_installed_transformers()
warn_of_untested_versions()
register_when_loaded()
