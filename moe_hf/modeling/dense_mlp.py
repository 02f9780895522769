"""Finds the MLP of each decoder layer from its structure, and reads its weights in one orientation.

No family is named here: an MLP is recognised by the attribute that holds it, the names of its projections and their
shapes. What one expert cannot reproduce exactly is refused.

Letters: D model width, F expert width.
"""

import inspect
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .configuration_moe import MoEError


MLP_ATTRIBUTES = ("mlp", "feed_forward", "ffn", "mlp_block", "mixer", "shared_mlp")
EXPERTS_ATTRIBUTES = ("experts", "block_sparse_moe")
INLINE_ATTRIBUTE = "mlp"

# (gate, up, down); without a gate, `up` may hold gate and up fused, which its shape tells.
PROJECTIONS = (
    ("gate_proj", "up_proj", "down_proj"),
    ("w1", "w3", "w2"),
    (None, "gate_up_proj", "down_proj"),
    (None, "up_proj", "down_proj"),
    (None, "c_fc", "c_proj"),
    (None, "fc1", "fc2"),
    (None, "dense_h_to_4h", "dense_4h_to_h"),
    (None, "fc_in", "fc_out"),
    (None, "Wi", "Wo"),
    (None, "input_linear", "output_linear"),
)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "gelu_impl", "activation", "activation_func")
OUTPUT_DROPOUTS = ("hidden_dropout", "residual_dropout")

SELF_CHECK_TOLERANCE = 1e-5


@dataclass(frozen=True)
class MLPSite:
    """Where one layer's dense MLP is, and how it is laid out.

    `layer` is the layer's dotted name in the base model and `attribute` the name of its MLP, or None when the
    projections sit in the layer itself. `gate` is None for a plain MLP and for a fused one.
    """

    layer_index: int
    layer: str
    attribute: str | None
    gate: str | None
    up: str
    down: str
    activation: str | None
    fused: bool
    hidden_size: int
    intermediate_size: int
    has_bias: bool
    dropout: float

    @property
    def gated(self) -> bool:
        """Whether an activated gate multiplies the up projection."""
        return self.gate is not None or self.fused

    @property
    def block(self) -> str:
        """Dotted name that the MoE block gets in the base model."""
        return f"{self.layer}.{self.attribute or INLINE_ATTRIBUTE}"


def _is_linear(module: object) -> bool:
    return isinstance(module, nn.Linear | Conv1D) and module.weight.dim() == 2


def _weight(module: nn.Module) -> torch.Tensor:
    """Weight of a linear layer as (out, in)."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def _describe(holder: nn.Module, layer_index: int, layer: str, attribute: str | None) -> MLPSite | None:
    """The layout of the MLP in `holder`, or None when its projections are not known ones."""
    for gate, up, down in PROJECTIONS:
        names = [name for name in (gate, up, down) if name is not None]
        if not all(_is_linear(getattr(holder, name, None)) for name in names):
            continue
        projections = [getattr(holder, name) for name in names]
        up_out, hidden_size = _weight(getattr(holder, up)).shape
        down_out, width = _weight(getattr(holder, down)).shape
        fused = gate is None and up_out == 2 * width
        if down_out != hidden_size or not (fused or up_out == width):
            continue
        activation = next((name for name in ACTIVATIONS if callable(getattr(holder, name, None))), None)
        dropouts = [m.p for m in holder.children() if isinstance(m, nn.Dropout)] if attribute else []
        dropouts += [getattr(holder, name, None) for name in OUTPUT_DROPOUTS] if attribute else []
        return MLPSite(
            layer_index=layer_index,
            layer=layer,
            attribute=attribute,
            gate=gate,
            up=up,
            down=down,
            activation=activation,
            fused=fused,
            hidden_size=hidden_size,
            intermediate_size=width,
            has_bias=any(projection.bias is not None for projection in projections),
            dropout=max((p for p in dropouts if isinstance(p, float)), default=0.0),
        )
    return None


def _site_of_layer(layer: nn.Module, layer_index: int, name: str) -> MLPSite | None:
    for path, module in layer.named_modules():
        # Beside a dense MLP too: some families add experts' outputs to it.
        if path.rpartition(".")[2] in EXPERTS_ATTRIBUTES:
            raise MoEError(
                f"{name}.{path} ({type(module).__name__}): the source already has experts; give a dense model."
            )
    for attribute in MLP_ATTRIBUTES:
        mlp = getattr(layer, attribute, None)
        if not isinstance(mlp, nn.Module):
            continue
        site = _describe(mlp, layer_index, name, attribute)
        if site is not None:
            return site
    return _describe(layer, layer_index, name, None)


def find_mlp_sites(base_model: nn.Module) -> list[MLPSite]:
    """Find the dense MLPs of a decoder, in layer order.

    Args:
        base_model (`nn.Module`): the decoder without its head.

    Returns:
        One `MLPSite` per layer that has an MLP; hybrid decoders may have layers without one.

    Raises:
        MoEError: when no layer has a known MLP, one already has experts, or DeepSpeed has cut the weights.
    """
    if any(hasattr(parameter, "ds_id") for parameter in base_model.parameters()):
        raise MoEError(
            "DeepSpeed's ZeRO-3 has cut the weights of this model already, and MLPs are found from whole ones. Load or build "
            "it before TrainingArguments are made, or in `with moe_hf.trainer.loaded_whole():`."
        )
    best: list[MLPSite] = []
    # Of this length, so that the layers of a vision or audio tower are not taken for the decoder's.
    depth = base_model.config.num_hidden_layers
    for name, layers in base_model.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == depth:
            sites = [_site_of_layer(layer, i, f"{name}.{i}") for i, layer in enumerate(layers)]
            sites = [site for site in sites if site is not None]
            best = max(best, sites, key=len)
    if not best:
        raise MoEError(
            f"{type(base_model).__name__} has no decoder layer with a known MLP: looked in {MLP_ATTRIBUTES} and the "
            f"layer itself for {[tuple(filter(None, row)) for row in PROJECTIONS]}."
        )
    return best


def holder_of(base_model: nn.Module, site: MLPSite) -> nn.Module:
    """The module that holds the projections of `site`: the MLP, or the layer when they are inline."""
    return base_model.get_submodule(f"{site.layer}.{site.attribute}" if site.attribute else site.layer)


def activation_of(holder: nn.Module, site: MLPSite):
    """The activation that the dense MLP itself uses; SiLU where the family calls `F.silu` without naming it."""
    return F.silu if site.activation is None else getattr(holder, site.activation)


def expert_tensors(holder: nn.Module, site: MLPSite) -> dict[str, torch.Tensor]:
    """The dense MLP's weights under the names and in the layout of one expert, as views where possible.

    Returns:
        `gate_up_proj` (2F, D) or `up_proj` (F, D), `down_proj` (D, F), and with biases `gate_up_proj_bias` (2F,) or
        `up_proj_bias` (F,), `down_proj_bias` (D,). A projection without a bias gets zeros when another has one.
    """
    up, down = getattr(holder, site.up), getattr(holder, site.down)
    first = [getattr(holder, site.gate), up] if site.gate is not None else [up]
    name = "gate_up_proj" if site.gated else "up_proj"
    tensors = {
        name: torch.cat([_weight(p) for p in first]) if len(first) > 1 else _weight(up),
        "down_proj": _weight(down),
    }
    if site.has_bias:

        def bias(projection: nn.Module) -> torch.Tensor:
            weight = _weight(projection)
            return projection.bias if projection.bias is not None else weight.new_zeros(weight.shape[0])

        tensors[f"{name}_bias"] = torch.cat([bias(p) for p in first])
        tensors["down_proj_bias"] = bias(down)
    return tensors


@torch.no_grad()
def check_one_expert_reproduces(holder: nn.Module, site: MLPSite) -> None:
    """Refuse an MLP that computes more than one expert can: compares both on random input, in float32.

    An inline MLP cannot be called alone; the check of the whole model covers it.

    Raises:
        MoEError: naming the parameters that an expert has no place for, or the measured difference.
    """
    if site.attribute is None:
        return
    known = {f"{name}." for name in (site.gate, site.up, site.down, site.activation) if name is not None}
    extra = [name for name, _ in holder.named_parameters() if not name.startswith(tuple(known))]
    if extra:
        raise MoEError(
            f"{site.block} ({type(holder).__name__}) has parameters that an expert has no place for: {extra}. "
            "This family cannot be turned into experts exactly."
        )
    tensors = expert_tensors(holder, site)
    if any(tensor.is_meta for tensor in tensors.values()):
        return
    down = tensors["down_proj"]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4, site.hidden_size, generator=generator).to(down.device, down.dtype)
    takes_residual = "residual" in inspect.signature(holder.forward).parameters
    was_training = holder.training
    holder.eval()
    try:
        expected = holder(inputs, torch.zeros_like(inputs)) if takes_residual else holder(inputs)
    finally:
        holder.train(was_training)
    expected = expected[0] if isinstance(expected, tuple) else expected
    hidden = F.linear(inputs, *_pair(tensors, "gate_up_proj" if site.gated else "up_proj"))
    activation = activation_of(holder, site)
    if site.gated:
        gate, up = hidden.chunk(2, dim=-1)
        hidden = activation(gate) * up
    else:
        hidden = activation(hidden)
    actual = F.linear(hidden, *_pair(tensors, "down_proj"))
    error = float((actual - expected).float().norm() / expected.float().norm().clamp_min(1e-30))
    tolerance = SELF_CHECK_TOLERANCE if down.dtype in (torch.float32, torch.float64) else 0.05
    if not error <= tolerance:
        raise MoEError(
            f"{site.block} ({type(holder).__name__}) computes something that one expert does not: relative "
            f"difference {error:.1e} on random input, allowed {tolerance:.0e}. Features inside the MLP, such as "
            "multipliers or activation sparsity, cannot be turned into experts exactly."
        )


def _pair(tensors: dict[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    return tensors[name], tensors.get(f"{name}_bias")
