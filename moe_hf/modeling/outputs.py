"""What the models return: the dense models' outputs, and what the routers did.

Letters: T tokens, E experts.
"""

from dataclasses import dataclass, fields

import torch
from transformers.modeling_outputs import (
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)

from .configuration_moe import MoEConfig
from .losses import LOSSES, LayerRouting, loss_coefficients, sum_over_ranks
from .routing_pass import RoutingPass


@dataclass
class MoEModelOutput(MoeModelOutputWithPast):
    """Output of [`MoEModel`].

    Args:
        router_logits (`tuple[torch.Tensor]`): raw logits per layer and (sub-)token, (T, E); with `output_router_logits`.
        router_losses (`dict[str, torch.Tensor]`): unweighted router losses by name, means over layers.
        router_stats (`dict[str, torch.Tensor]`): the routers' figures by name, such as `dropped_share`, means over layers.
    """

    router_losses: dict[str, torch.Tensor] | None = None
    router_stats: dict[str, torch.Tensor] | None = None


@dataclass
class MoECausalLMOutput(MoeCausalLMOutputWithPast):
    """Output of [`MoEForCausalLM`].

    Args:
        loss (`torch.Tensor`): the language-modelling loss; in training plus `aux_loss`.
        aux_loss (`torch.Tensor`): weighted sum of the router losses; in training the very term that was added to
            `loss`, in evaluation reported only, with `output_router_logits`.
        router_logits (`tuple[torch.Tensor]`): raw logits per layer and (sub-)token, (T, E); with `output_router_logits`.
        router_losses (`dict[str, torch.Tensor]`): unweighted router losses by name, means over layers.
        router_stats (`dict[str, torch.Tensor]`): the routers' figures by name, such as `dropped_share`, means over layers.
    """

    router_losses: dict[str, torch.Tensor] | None = None
    router_stats: dict[str, torch.Tensor] | None = None


@dataclass
class MoESequenceClassifierOutput(SequenceClassifierOutputWithPast):
    """Output of [`MoEForSequenceClassification`].

    Args:
        loss (`torch.Tensor`): the loss of the labels; in training plus `aux_loss`.
        aux_loss (`torch.Tensor`): as in [`MoECausalLMOutput`], and so are the router's other fields.
    """

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_losses: dict[str, torch.Tensor] | None = None
    router_stats: dict[str, torch.Tensor] | None = None


@dataclass
class MoETokenClassifierOutput(TokenClassifierOutput):
    """Output of [`MoEForTokenClassification`].

    Args:
        loss (`torch.Tensor`): the loss of the labels; in training plus `aux_loss`.
        aux_loss (`torch.Tensor`): as in [`MoECausalLMOutput`], and so are the router's other fields.
    """

    aux_loss: torch.Tensor | None = None
    router_logits: tuple[torch.Tensor, ...] | None = None
    router_losses: dict[str, torch.Tensor] | None = None
    router_stats: dict[str, torch.Tensor] | None = None


OUTPUTS = (MoEModelOutput, MoECausalLMOutput, MoESequenceClassifierOutput, MoETokenClassifierOutput)
_KNOWN_FIELDS = {cls: frozenset(f.name for f in fields(cls)) for cls in OUTPUTS}


def extended(output_class: type, outputs, **more):
    """`outputs` of the dense model as an `output_class`, with fields added; fields it does not know are kept too."""
    known = _KNOWN_FIELDS[output_class]
    result = output_class(**{k: v for k, v in outputs.items() if k in known and k not in more}, **more)
    for name, value in outputs.items():
        if name not in known:
            result[name] = value
    return result


def losses_by_name(
    current: RoutingPass, config: MoEConfig, training: bool, report: bool
) -> dict[str, torch.Tensor] | None:
    """Unweighted losses by name, each the mean over the MoE layers; None when nothing was recorded.

    Those with a coefficient above 0, and with `report` every loss that the configuration names.
    """
    layers = current.layers
    if not current.record or not layers:
        return None
    is_step = training and torch.is_grad_enabled()
    if is_step and config.balance_loss_scope == "global_batch":
        counts = [layer.choice_counts() if layer.step_counts is None else layer.step_counts for layer in layers]
        for layer, total in zip(layers, sum_over_ranks(counts), strict=True):
            layer.global_counts = total
    losses, device = {}, layers[0].router_logits.device
    for name, coefficient in loss_coefficients(config).items():
        if coefficient > 0 or report:
            values = [LOSSES[name](layer) for layer in layers]
            values = [value.to(device) for value in values if value is not None]
            if values:
                losses[name] = torch.stack(values).mean()
    return losses or None


def mean_stats(layers: list[LayerRouting]) -> dict[str, torch.Tensor] | None:
    """The figures that routers reported, by name, each the mean over the layers that have it."""
    stats = [layer.routing.stats for layer in layers]
    values = {name: [s[name] for s in stats if name in s] for name in sorted({name for s in stats for name in s})}
    return {name: torch.stack([v.to(of[0].device) for v in of]).mean() for name, of in values.items()} or None
