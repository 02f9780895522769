"""Count which experts the tokens use, per layer and domain, while batches stream by.

Letters: B batch, S sequence, T = B * S tokens, K experts per token, L MoE layers, E experts, N domains.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_hf.errors import MoEError
from moe_hf.router_outputs import find_routers, real_choices


@dataclass(frozen=True)
class RoutingCounts:
    """Routed choices by domain, layer and expert.

    Attributes:
        domains: names, N.
        layers: names of the MoE blocks, L.
        counts: (N, L, E), int64; a token counts once for each of its experts.
    """

    domains: tuple[str, ...]
    layers: tuple[str, ...]
    counts: torch.Tensor

    def load(self) -> torch.Tensor:
        """Share of a layer's choices that each expert takes, times E: (L, E), 1 where balanced."""
        return _relative_load(self.counts.sum(0))

    def load_by_domain(self) -> torch.Tensor:
        """The same within each domain: (N, L, E)."""
        return _relative_load(self.counts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"domains": list(self.domains), "layers": list(self.layers), "counts": self.counts.tolist()}


def _relative_load(counts: torch.Tensor) -> torch.Tensor:
    total = counts.sum(-1, keepdim=True).clamp_min(1)
    return counts.double() * counts.shape[-1] / total


@torch.no_grad()
def count_routing(model: nn.Module, batches: Mapping[str, Iterable[Mapping[str, torch.Tensor]]]) -> RoutingCounts:
    """Run a MoE model over batches of each domain and count the choices of its routers.

    Works on this package's models and on transformers' own whose router returns (logits, weights, index). Memory does
    not grow with the text: a batch adds to one (N, L, E) table. The model is put back into the mode it was in.

    Args:
        batches (`dict[str, Iterable]`): for each domain, batches of model inputs; padding (`attention_mask` 0) does not
            count, and `labels` are not passed on.

    Raises:
        MoEError: the model has no routers, a router does not return its choices, or no domain is given.
    """
    routers = find_routers(model)
    if not routers:
        raise MoEError(f"{type(model).__name__} has no MoE block: there is no routing to count.")
    if not batches:
        raise MoEError("No domain was given: pass at least one, as {'text': batches}.")
    num_experts = max(router.weight.shape[0] for router in routers.values())
    counter = _Counter(len(batches), list(routers), num_experts)
    handles = [router.register_forward_hook(counter.hook(name)) for name, router in routers.items()]
    was_training = model.training
    model.eval()
    try:
        for domain, domain_batches in enumerate(batches.values()):
            counter.domain = domain
            for batch in domain_batches:
                inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
                counter.mask = _token_mask(inputs)
                model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return RoutingCounts(tuple(batches), tuple(routers), counter.counts)


def _token_mask(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    mask = inputs.get("attention_mask")
    return None if mask is None else mask.reshape(-1).bool()


class _Counter:
    def __init__(self, num_domains: int, layers: list[str], num_experts: int):
        self.layers = layers
        self.counts = torch.zeros(num_domains, len(layers), num_experts, dtype=torch.int64)
        self.domain = 0
        self.mask: torch.Tensor | None = None

    def hook(self, name: str):
        layer = self.layers.index(name)

        def count(module: nn.Module, args: tuple, output: Any) -> None:
            _, index = real_choices(module, output, self.mask)
            self.counts[self.domain, layer] += index.flatten().bincount(minlength=self.counts.shape[-1]).cpu()

        return count
