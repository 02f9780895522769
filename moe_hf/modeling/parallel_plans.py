"""Parallel plans of the experts, by the names that transformers' `DistributedConfig` reads."""

from .dense_mlp import MLPSite


def wildcard(name: str) -> str:
    """`layers.3.mlp` -> `layers.*.mlp`, as parallel plans are written."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def expert_parallel_plan(block: str, site: MLPSite) -> dict[str, str]:
    """Each rank holds some of the experts; tokens are sent to the rank of their expert and back."""
    first = "gate_up_proj" if site.gated else "up_proj"
    names = [first, "down_proj"] + ([f"{first}_bias", "down_proj_bias"] if site.has_bias else [])
    return {
        **{f"{block}.experts.{name}": "grouped_gemm" for name in names},
        f"{block}.experts": "ep_dispatch_experts",
    }


def tensor_parallel_plan(block: str, site: MLPSite) -> dict[str, str]:
    """Each rank holds a slice of every expert's width; the bias of `down_proj` is whole on each (see MoEBlock)."""
    if site.gated:
        plan = {"gate_up_proj": "packed_colwise", "gate_up_proj_bias": "packed_rowwise"}
    else:
        plan = {"up_proj": "colwise", "up_proj_bias": "rowwise"}
    plan["down_proj"] = "rowwise"
    return {
        **{f"{block}.experts.{k}": v for k, v in plan.items() if site.has_bias or not k.endswith("_bias")},
        f"{block}.experts": "moe_tp_experts",
    }
