"""Parallel plans of the blocks, by the names that transformers' `DistributedConfig` reads, and what they refuse."""

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig

from .configuration_moe import MoEConfig, MoEError
from .dense_mlp import MLPSite
from .expert_plan import expert_plan


def wildcard(name: str) -> str:
    """`layers.3.mlp` -> `layers.*.mlp`, as parallel plans are written."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def expert_parallel_plan(block: str, site: MLPSite) -> dict[str, str]:
    """The matrices of all experts, and their biases where they have them."""
    first = "gate_up_proj" if site.gated else "up_proj"
    names = [first, "down_proj"] + ([f"{first}_bias", "down_proj_bias"] if site.has_bias else [])
    return expert_plan(block, names)


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


def shared_expert_plan(block: str, site: MLPSite) -> dict[str, str]:
    """Each rank holds a slice of the shared expert's width."""
    plan = {"up_proj": "colwise", "down_proj": "rowwise"} | ({"gate_proj": "colwise"} if site.gated else {})
    return {f"{block}.shared_expert.{name}": style for name, style in plan.items()}


def block_plans(
    config: MoEConfig, sites: list[MLPSite], merges_experts: bool
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """The tensor-parallel, expert-parallel and FSDP rules of the blocks at `sites`.

    What has no rule (routers, the projections of a multi-head block, gates of shared experts, experts of other kinds) is
    whole on each tensor-parallel rank. FSDP gathers one decoder layer at a time.

    Args:
        merges_experts (`bool`): the experts' weights are mixed before they are used, for which a rank needs all of them.
    """
    tensor, expert, sharded = {}, {}, {}
    for site in sites:
        block = wildcard(site.block)
        tensor |= tensor_parallel_plan(block, site)
        if config.shared_expert_intermediate_size > 0:
            tensor |= shared_expert_plan(block, site)
        if not merges_experts:
            expert |= expert_parallel_plan(block, site)
        sharded[wildcard(site.layer)] = "free_full_weight"
    return tensor, expert, sharded


def without_blocks(plan: dict[str, str], sites: list[MLPSite]) -> dict[str, str]:
    """The plan of a dense decoder without its MLPs, which blocks have replaced."""
    replaced = tuple({f"{wildcard(site.block)}." for site in sites})
    return {name: style for name, style in plan.items() if not name.startswith(replaced)}


def refuse_layout(model: PreTrainedModel, layout: DistributedConfig, merges_experts: bool) -> None:
    """Refuse a layout that one of our models cannot have, before anything is sharded.

    Raises:
        MoEError: says what is in the way, and what to choose instead.
    """
    config, has_own_plan = model.config, isinstance(layout.tp_plan, dict)
    if layout.tp_size > 1 and not (model.tp_plan or has_own_plan):
        raise MoEError(
            f"transformers has no tensor-parallel plan for {config.text_config.model_type!r}, so tp_size="
            f"{layout.tp_size} is refused. Shard it with fsdp_size, and its experts with ep_size."
        )
    refuse_heads(config, layout.tp_size)
    if layout.ep_size == 1:
        return
    if merges_experts:
        raise MoEError(
            f"router_type={config.router_type!r} mixes the weights of all experts, so no rank can do with some of them: "
            f"ep_size={layout.ep_size} is refused. Use fsdp_size or tp_size."
        )
    for site in model.base_model._moe_sites:
        experts = config.experts_of_layer(site.layer_index)
        if experts % layout.ep_size:
            raise MoEError(
                f"ep_size={layout.ep_size} does not divide the {experts} experts of layer {site.layer_index}. Choose a "
                "divisor, or another number of experts."
            )


def refuse_heads(config: PreTrainedConfig, tp_size: int) -> None:
    """Refuse a number of attention heads that tensor parallelism cannot share out: torch fails in the forward pass.

    Raises:
        MoEError: `tp_size` does not divide the heads, or the key-value heads.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % tp_size:
            raise MoEError(f"tp_size={tp_size} does not divide {name}, {heads}. Choose a divisor, or use fsdp_size.")
