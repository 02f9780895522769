"""The routed experts of one layer as fused 3-D parameters, behind transformers' experts interface.

Letters: T tokens, D model width, F expert width, E experts, K experts per token.
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F
from transformers.integrations import use_experts_implementation

from .configuration_moe import MoEConfig, MoEError
from .dense_mlp import MLPSite


@use_experts_implementation
class Experts(nn.Module):
    """E MLPs of one shape: `gate_up_proj` (E, 2F, D) or `up_proj` (E, F, D), `down_proj` (E, D, F), biases (E, ...).

    With `expert_intermediate_sizes` F is the largest, and the neurons that an expert does not have are zeros: as their
    activation is 0 they add nothing, and no gradient reaches them, so that they stay zeros under any optimizer whose
    weight decay is proportional to the weights. An adapter on these tensors, or noise, would fill them.

    The forward below is the implementation called `eager`; transformers dispatches to the others by
    `config._experts_implementation`.
    """

    def __init__(self, config: MoEConfig, site: MLPSite, act_fn):
        super().__init__()
        width = config.moe_intermediate_size or site.intermediate_size
        rows, name = (2 * width, "gate_up_proj") if site.gated else (width, "up_proj")
        self.num_experts, self.widths = config.experts_of_layer(site.layer_index), config.expert_intermediate_sizes
        self.register_parameter(name, nn.Parameter(torch.empty(self.num_experts, rows, site.hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, site.hidden_size, width))
        if site.has_bias:
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(self.num_experts, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(self.num_experts, site.hidden_size))
        self.act_fn = copy.deepcopy(act_fn)
        if self.widths is not None and not site.gated:
            at_zero = act_fn(torch.zeros(1, device="cpu"))
            if not at_zero.is_meta and at_zero.item() != 0:
                raise MoEError("expert_intermediate_sizes needs an activation that is 0 at 0, or gated experts.")

    @torch.no_grad()
    def zero_padding_(self) -> None:
        """Zero the neurons that experts do not have, with `expert_intermediate_sizes`."""
        for expert, width in enumerate(self.widths or ()):
            for name, tensor in self.named_parameters(recurse=False):
                if name == "down_proj":
                    tensor[expert, :, width:] = 0
                elif name != "down_proj_bias":
                    halves = tensor[expert].unflatten(0, (-1, self.down_proj.shape[-1]))  # (1 or 2, F, ...)
                    halves[:, width:] = 0

    def forward(
        self,
        hidden_states: torch.Tensor,  # (T, D)
        top_k_index: torch.Tensor,  # (T, K)
        top_k_weights: torch.Tensor,  # (T, K)
    ) -> torch.Tensor:
        first = "gate_up_proj" if self.has_gate else "up_proj"
        # One unbind per tensor: indexing W[e] would backpropagate a zero-filled (E, ...) gradient per expert.
        weights = [getattr(self, first).unbind(0), self.down_proj.unbind(0)]
        biases = [(None,) * self.num_experts] * 2
        if self.has_bias:
            biases = [getattr(self, f"{first}_bias").unbind(0), self.down_proj_bias.unbind(0)]
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if token.numel() == 0 and expert > 0:
                continue  # the first runs on none too: the parameters have a gradient when no MLP is chosen
            hidden = F.linear(hidden_states[token], weights[0][expert], biases[0][expert])
            hidden = self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden)
            hidden = F.linear(hidden, weights[1][expert], biases[1][expert]) * top_k_weights[token, slot, None]
            output = output.index_add(0, token, hidden.to(output.dtype))
        return output


def make_experts(config: MoEConfig, site: MLPSite, act_fn) -> Experts:
    """Build the experts of the layer at `site`, with the dense MLP's own kind of gate, bias and activation."""
    experts = Experts(config, site, act_fn)
    # The decorator fixes these two for a whole class; the kernels read them from the instance.
    experts.has_gate, experts.has_bias = site.gated, site.has_bias
    if config.extra_experts:
        # Ids of E and above are of no MLP: the kernels skip them, as they do those of experts on other ranks.
        experts._is_expert_parallel = True
    return experts


class DenseMLP(nn.Module):
    """One MLP of the dense kind that sees each token, (..., D) -> (..., D)."""

    def __init__(self, width: int, site: MLPSite, act_fn):
        super().__init__()
        self.gate_proj = nn.Linear(site.hidden_size, width, bias=site.has_bias) if site.gated else None
        self.up_proj = nn.Linear(site.hidden_size, width, bias=site.has_bias)
        self.down_proj = nn.Linear(width, site.hidden_size, bias=site.has_bias)
        self.act_fn = copy.deepcopy(act_fn)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = self.up_proj(hidden_states)
        hidden = self.act_fn(hidden) if self.gate_proj is None else self.act_fn(self.gate_proj(hidden_states)) * hidden
        return self.down_proj(hidden)


class SharedExpert(DenseMLP):
    """An expert that each token uses."""

    def __init__(self, config: MoEConfig, site: MLPSite, act_fn):
        super().__init__(config.shared_expert_intermediate_size, site, act_fn)


class DenseFFN(DenseMLP):
    """A dense layer next to the experts, as wide as the dense model's; its `down_proj` starts at zero, so it adds nothing.

    Source: ST-MoE, section on sparse and dense layers next to each other (https://huggingface.co/papers/2202.08906).
    """

    def __init__(self, site: MLPSite, act_fn):
        super().__init__(site.intermediate_size, site, act_fn)
