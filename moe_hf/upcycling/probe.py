"""What the routers of a MoE do with some tokens: how sure they are, and which experts get any.

Letters: B batch, S sequence, T tokens, D model width, E experts, K experts per token, L MoE layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import logging

from moe_hf.errors import MoEError
from moe_hf.modeling.router import Router
from moe_hf.modeling.routing import wide
from moe_hf.router_outputs import find_routers, real_choices
from moe_hf.unwrapping import unwrapped
from moe_hf.upcycling.router_init.entropy import mean_entropy
from moe_hf.upcycling.router_init.hidden_states import check_token_ids


SATURATED = 0.9
# That an even router misses an expert of the model; above it, a missed expert says nothing about the router.
CHANCE_OF_A_MISS = 0.01
LAYERS_NAMED = 4

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class RoutingProbe:
    """How the routers of a model treat some tokens.

    Attributes:
        num_tokens: T; sub-tokens, where these are routed.
        layers: names of the MoE blocks, L.
        top_1_probability: of each layer, the mean over tokens of the largest score, of scores that sum to 1; experts
            with equal logits, as shards of one copy have, count together.
        entropy: of each layer, the mean entropy of the scores in parts of ln E.
        tokens_per_expert: of each layer, (E,) int64; a token counts for each of its K experts.
        closed: of each layer, the experts that `expert_groups` closed to all of these tokens.
        is_text: whether the tokens are those of a text; random ones reach other experts than any text does.
    """

    num_tokens: int
    layers: tuple[str, ...]
    top_1_probability: tuple[float, ...]
    entropy: tuple[float, ...]
    tokens_per_expert: tuple[torch.Tensor, ...]
    closed: tuple[frozenset[int], ...]
    is_text: bool = True

    @property
    def saturated(self) -> tuple[str, ...]:
        """The layers whose mean top-1 probability is above 0.9: their routers hardly learn."""
        facts = zip(self.layers, self.top_1_probability, self.tokens_per_expert, strict=True)
        return tuple(name for name, top, counts in facts if top > SATURATED and len(counts) > 1)

    @property
    def is_large_enough(self) -> bool:
        """Whether an even router would reach each open expert of each layer, but for a chance below 1%."""
        chance = 0.0
        for counts, closed in zip(self.tokens_per_expert, self.closed, strict=True):
            num_open = len(counts) - len(closed)
            share = float(counts.sum()) / max(self.num_tokens * num_open, 1)
            chance += num_open * (1 - min(share, 1)) ** self.num_tokens
        return chance < CHANCE_OF_A_MISS

    @property
    def can_tell_unreached(self) -> bool:
        """Whether an expert without tokens says something about the router: on text, and enough of it."""
        return self.is_text and self.is_large_enough

    @property
    def never_reached(self) -> dict[str, list[int]]:
        """By layer, the experts that no token chose of those that it could; empty where that says nothing of a text."""
        if not self.can_tell_unreached:
            return {}
        layers = zip(self.layers, self.tokens_per_expert, self.closed, strict=True)
        missed = {name: sorted(set(torch.where(row == 0)[0].tolist()) - closed) for name, row, closed in layers}
        return {name: experts for name, experts in missed.items() if experts}

    def warnings(self) -> list[str]:
        """What a user should know before training; empty when nothing is wrong."""
        found = []
        if self.saturated:
            worst = max(self.top_1_probability)
            found.append(
                f"The router of {_some(self.saturated)} is saturated: its first choice has a mean probability of up to "
                f"{worst:.2f} on {self.num_tokens} tokens, above {SATURATED}, so that the others get hardly any gradient. "
                'Use router_init="entropy" with some of your text as inputs, or smaller rows.'
            )
        missed = self.never_reached
        if missed:
            count = sum(map(len, missed.values()))
            names = [f"{name} {experts}" for name, experts in missed.items()]
            found.append(
                f"{count} of {sum(map(len, self.tokens_per_expert))} experts got none of the probe's {self.num_tokens} tokens: "
                f"{_some(names)}. They start to learn when the load-balancing loss sends them tokens; "
                'router_init="kmeans" on your text avoids it.'
            )
        return found

    def warn(self) -> None:
        """Log the warnings."""
        for message in self.warnings():
            logger.warning(message)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint's metadata: per layer, but not per expert."""
        return {
            "num_tokens": self.num_tokens,
            "top_1_probability": [round(value, 4) for value in self.top_1_probability],
            "entropy": [round(value, 4) for value in self.entropy],
            "can_tell_unreached": self.can_tell_unreached,
            "never_reached": self.never_reached,
        }


class RoutingRecorder:
    """Sums up what routers answer while a model runs: `with recorder.watch(model): model(...)`, then `result()`.

    Args:
        is_text (`bool`): whether it runs on text.
    """

    def __init__(self, *, is_text: bool = True):
        self.is_text = is_text
        self.layers: dict[str, _LayerSums] = {}

    @contextmanager
    def watch(self, model: PreTrainedModel, attention_mask: torch.Tensor | None = None) -> Iterator[None]:
        """Record the forward passes inside.

        Args:
            model (`PreTrainedModel`): this package's, or one of transformers' whose router returns (logits, weights,
                index).
            attention_mask (`torch.Tensor`, *optional*): (B, S) of these passes, 0 for padding, which does not count.

        Raises:
            MoEError: when the model has no routers.
        """
        routers = find_routers(model)
        if not routers:
            raise MoEError(f"{type(model).__name__} has no MoE block: there is no routing to look at.")
        mask = None if attention_mask is None else attention_mask.flatten().bool()
        handles = []
        for name, router in routers.items():
            sums = self.layers.setdefault(name, _LayerSums(router, model.config))
            handles.append(router.register_forward_hook(sums.hook(mask)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def result(self) -> RoutingProbe:
        """The figures over all that was recorded."""
        layers = self.layers.values()
        if not layers or not all(layer.num_tokens for layer in layers):
            raise MoEError("No forward pass was recorded.")
        return RoutingProbe(
            num_tokens=next(iter(layers)).num_tokens,
            layers=tuple(self.layers),
            top_1_probability=tuple(layer.top_1 / layer.num_tokens for layer in layers),
            entropy=tuple(layer.entropy / layer.num_tokens for layer in layers),
            tokens_per_expert=tuple(layer.tokens_per_expert for layer in layers),
            closed=tuple(frozenset(torch.where(layer.closed)[0].tolist()) for layer in layers),
            is_text=self.is_text,
        )


class _LayerSums:
    """Sums over the tokens of one router."""

    def __init__(self, router: nn.Module, config):
        # transformers' routers with a bias that corrects the choice score with sigmoids, and have no field that says so.
        sigmoid = hasattr(router, "e_score_correction_bias")
        self.scoring_func = getattr(config, "scoring_func", "sigmoid" if sigmoid else "softmax")
        self.num_tokens, self.top_1, self.entropy = 0, 0.0, 0.0
        num_experts = len(router.weight)
        if isinstance(router, Router):
            num_experts = config.experts_of_layer(router.layer_index) + len(config.extra_experts)
        self.tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64)
        self.closed = torch.ones(num_experts, dtype=torch.bool)

    def hook(self, mask: torch.Tensor | None):
        """A forward hook that adds the tokens where `mask` (T,) is True."""

        @torch.no_grad()
        def add(router: nn.Module, args: tuple, output: Any) -> None:
            if not isinstance(router, Router) and isinstance(output, tuple):
                # Some routers of transformers return the logits after the softmax.
                tokens = wide(args[0].flatten(0, -2))
                output = (functional.linear(tokens, router.weight.to(tokens.dtype)), *output[1:])
            logits, index = real_choices(router, output, mask)
            scores = logits if self.scoring_func == "softmax" else functional.logsigmoid(logits)
            probability = scores.softmax(-1)
            largest = probability.max(-1, keepdim=True).values
            first = probability >= largest * (1 - 1e-5)
            # Where all are equal, there is no first choice.
            first &= ~first.all(-1, keepdim=True)
            self.top_1 += float(
                probability.where(first, 0).sum() + largest.where(~first.any(-1, keepdim=True), 0).sum()
            )
            if logits.shape[-1] > 1:
                self.entropy += mean_entropy(logits, self.scoring_func) * len(logits)
            # The least finite number, as `limit_logits` has it.
            self.closed &= (logits == torch.finfo(logits.dtype).min).all(0).cpu()
            self.num_tokens += len(logits)
            self.tokens_per_expert += index.flatten().bincount(minlength=len(self.tokens_per_expert)).cpu()

        return add


def probe_routing(
    moe: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> RoutingProbe:
    """Run a MoE model on some tokens and look at its routers; the model is put back into the mode it was in.

    Args:
        moe (`PreTrainedModel`): this package's, or one of transformers'; in memory or from `load_layerwise`.
        input_ids (`torch.Tensor`): (B, S).
        attention_mask (`torch.Tensor`, *optional*): (B, S), 0 for padding.

    Raises:
        MoEError: when the model has no routers, or the inputs are not token ids.
    """
    check_token_ids("inputs", input_ids)
    moe, recorder = unwrapped(moe), RoutingRecorder()
    device = "cpu" if moe.device.type == "meta" else moe.device
    mask = None if attention_mask is None else attention_mask.to(device)
    was_training = moe.training
    moe.eval()
    try:
        with torch.no_grad(), recorder.watch(moe, mask):
            moe.base_model(input_ids=input_ids.to(device), attention_mask=mask, use_cache=False)
    finally:
        moe.train(was_training)
    return recorder.result()


def _some(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - LAYERS_NAMED} more layers" if len(names) > LAYERS_NAMED else ""
    return ", ".join(names[:LAYERS_NAMED]) + more
