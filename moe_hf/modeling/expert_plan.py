"""The expert-parallel plan of a block of experts, by the names that transformers' `DistributedConfig` reads."""


def expert_plan(block: str, matrices: list[str]) -> dict[str, str]:
    """Each rank holds some of the experts of `block`; tokens are sent to the rank of their expert and back."""
    return {
        **{f"{block}.experts.{name}": "grouped_gemm" for name in matrices},
        f"{block}.experts": "ep_dispatch_experts",
    }


def plan_from_dense(tensor_plan: dict[str, str] | None) -> dict[str, str] | None:
    """The plan of the blocks that stand in the place of MLPs, from the tensor-parallel plan of the dense decoder.

    A configuration alone knows no more: biases are left out, and it is None where that plan names no MLP. The model knows
    its blocks whatever the family (`model.ep_plan`).
    """
    named = [name.rpartition(".") for name in tensor_plan or () if ".mlp." in name]
    blocks, inside = {block for block, _, _ in named if block.endswith(".mlp")}, {name for *_, name in named}
    if len(blocks) != 1:
        return None
    first = "gate_up_proj" if inside & {"gate_proj", "gate_up_proj"} else "up_proj"
    return expert_plan(blocks.pop(), [first, "down_proj"])
