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

from .losses import LayerRouting


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


def mean_stats(layers: list[LayerRouting]) -> dict[str, torch.Tensor] | None:
    """The figures that routers reported, by name, each the mean over the layers that have it."""
    stats = [layer.routing.stats for layer in layers]
    values = {name: [s[name] for s in stats if name in s] for name in sorted({name for s in stats for name in s})}
    return {name: torch.stack([v.to(of[0].device) for v in of]).mean() for name, of in values.items()} or None
