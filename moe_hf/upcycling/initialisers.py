"""Fills the MoE blocks from the dense MLPs that they replace.

Letters: D model width, F expert width, E experts.
"""

import torch
from torch import nn

from moe_hf.modeling.configuration_moe import MoEConfig, MoEError
from moe_hf.modeling.dense_mlp import MLPSite, activation_of, expert_tensors, holder_of
from moe_hf.modeling.moe_block import MoEBlock


INITIALISERS = ("copy",)


def check_init(init: str, noise: float) -> None:
    """Refuse an unknown initialiser or a noise that is not a finite number of at least 0."""
    if init not in INITIALISERS:
        raise MoEError(f"init is {init!r}; it must be one of {list(INITIALISERS)}.")
    if not 0 <= noise < float("inf"):
        raise MoEError(f"noise is {noise}; it must be finite and at least 0, relative to each tensor's own spread.")


@torch.no_grad()
def fill_blocks(dense_base: nn.Module, moe_base: nn.Module, config: MoEConfig, *, noise: float, seed: int) -> None:
    """Copy each dense MLP into all experts of its layer, and draw the routers.

    With `noise` > 0 each expert tensor gets Gaussian noise of that many standard deviations of the tensor. Router
    rows are N(0, 1 / D), so that logits have a spread of about 1 on a normalised input, whatever the width.

    Args:
        dense_base, moe_base (`nn.Module`): the decoders without heads, of the same family.
        config (`MoEConfig`): the MoE model's configuration.
        noise (`float`): dimensionless.
        seed (`int`): of all random numbers; the same seed gives the same bytes.

    Source: sparse upcycling, section 3 (https://huggingface.co/papers/2212.05055).
    """
    generator = torch.Generator().manual_seed(seed)
    for site in moe_base._moe_sites:
        block: MoEBlock = moe_base.get_submodule(site.block)
        holder = holder_of(dense_base, site)
        tensors = expert_tensors(holder, site)
        _copy_activation(activation_of(holder, site), block)
        share = _fill_shared_expert(block, tensors, config)
        for name, tensor in tensors.items():
            target = getattr(block.experts, name)
            if target.shape[1:] != tensor.shape:
                raise MoEError(
                    f'init="copy" needs experts as wide as the dense MLP of {site.layer} '
                    f"({site.intermediate_size}), and moe_intermediate_size is {config.moe_intermediate_size}."
                )
            target.copy_(tensor * share if name.startswith("down_proj") else tensor)
            if noise > 0:
                drawn = torch.randn(target.shape, generator=generator, dtype=torch.float32)
                spread = tensor.float().std(unbiased=False)
                target.add_((drawn * noise).to(target.device) * spread.to(target.device))
        rows = torch.randn(block.gate.weight.shape, generator=generator, dtype=torch.float32)
        block.gate.weight.copy_(rows / site.hidden_size**0.5)


def _copy_activation(activation: object, block: MoEBlock) -> None:
    """Copy what an activation has learned, where it is a module with parameters."""
    for part in (block.experts, block.shared_expert):
        if part is not None and isinstance(activation, nn.Module):
            part.act_fn.load_state_dict(activation.state_dict())


def _fill_shared_expert(block: MoEBlock, tensors: dict[str, torch.Tensor], config: MoEConfig) -> float:
    """Fill the shared expert, if any, and return the share of the output that the routed experts keep.

    As wide as the dense MLP it takes half of the output: by a gate of zeros (sigmoid 0.5), or by halved output
    weights. Otherwise its output weights are zero and the routed experts keep all.
    """
    shared = block.shared_expert
    if shared is None:
        return 1.0
    first = "gate_up_proj" if shared.gate_proj is not None else "up_proj"
    if config.shared_expert_intermediate_size != tensors["down_proj"].shape[1]:
        nn.init.zeros_(shared.down_proj.weight)
        if shared.down_proj.bias is not None:
            nn.init.zeros_(shared.down_proj.bias)
        return 1.0
    gated = block.shared_expert_gate is not None
    if gated:
        nn.init.zeros_(block.shared_expert_gate.weight)
    for suffix, kind in (("", "weight"), ("_bias", "bias")):
        if first + suffix not in tensors:
            continue
        rows = tensors[first + suffix]
        if shared.gate_proj is not None:
            gate, rows = rows.chunk(2)
            getattr(shared.gate_proj, kind).copy_(gate)
        getattr(shared.up_proj, kind).copy_(rows)
        getattr(shared.down_proj, kind).copy_(tensors["down_proj" + suffix] * (1.0 if gated else 0.5))
    return 0.5


def copy_shared_weights(dense: nn.Module, moe: nn.Module, sites: list[MLPSite], prefix: str) -> None:
    """Copy every parameter and buffer outside of the replaced MLPs; each must exist on both sides, in one shape.

    Raises:
        MoEError: naming tensors that one side lacks.
    """
    replaced = set()
    for site in sites:
        holder = f"{prefix}{site.layer}." + (f"{site.attribute}." if site.attribute else "")
        names = [""] if site.attribute else [f"{n}." for n in (site.up, site.down, site.activation) if n]
        replaced |= {holder + name for name in names}
    blocks = tuple(f"{prefix}{site.block}." for site in sites)
    source = {k: v for k, v in dense.state_dict().items() if not k.startswith(tuple(replaced))}
    target = {k: v for k, v in moe.state_dict().items() if not k.startswith(blocks)}
    if source.keys() != target.keys():
        raise MoEError(
            f"The dense model and the MoE model do not have the same tensors outside of the MLPs: only dense "
            f"{sorted(source.keys() - target.keys())[:4]}, only MoE {sorted(target.keys() - source.keys())[:4]}."
        )
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)
