"""What routers know about the tokens in a cache, kept beside their keys and values.

A router that decides by earlier tokens of the sequence (`routing_level="prefix"`, `"segment_merge"`) needs a few numbers
about them when only the new ones are shown to it. They live in the cache object, and move with it: beams are reordered,
rows are repeated and selected, and a copy of the cache is a copy of them.

Letters: B batch, S sequence, T = B * S tokens.
"""

from functools import cache as memoised
from typing import Any

import torch
from transformers import Cache

from .configuration_moe import MoEError


Carry = dict[str, torch.Tensor]


class _RoutingCache:
    """Goes before a class of caches; `carry` has (B, ...) tensors by name for each MoE layer, by its index."""

    carry: dict[int, Carry]

    def reset(self) -> None:
        super().reset()
        self.carry = {}

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.carry = _each(self.carry, lambda value: value.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove and self.carry:
            raise MoEError(
                "This model's routers decide by a summary of the earlier tokens, from which single tokens cannot be taken "
                "back: the cache cannot be cropped. Leave out assisted generation (assistant_model, prompt_lookup_num_tokens)."
            )
        super().crop(tokens_to_remove)

    def _select(self, rows: torch.Tensor) -> None:
        self.carry = _each(self.carry, lambda value: value.index_select(0, rows.to(value.device)))


def _each(carry: dict[int, Carry], function) -> dict[int, Carry]:
    return {layer: {name: function(value) for name, value in of.items()} for layer, of in carry.items()}


@memoised
def _with_routing(cache_class: type) -> type:
    return type(cache_class.__name__, (_RoutingCache, cache_class), {"__module__": cache_class.__module__})


def keep_carry(cache: Cache, carry: dict[int, Carry]) -> None:
    """Put what the routers carry on, by layer, into the cache of the tokens that it is about."""
    if not isinstance(cache, _RoutingCache):
        cache.__class__ = _with_routing(type(cache))
    cache.carry = carry


def carried_by(cache: Cache | None, position_ids: torch.Tensor | None) -> dict[int, Carry]:
    """What the routers carried on from the tokens in `cache`, by layer; {} where it has none.

    A row whose new tokens start at position 0 begins another document: nothing is carried on to it.

    Raises:
        MoEError: the cache has tokens that another model put there.
    """
    if cache is None or cache.get_seq_length() == 0:
        return {}
    if not getattr(cache, "carry", None):
        raise MoEError(
            "The cache has tokens, and nothing about them that this model's routers decide by: it was filled by another "
            "model, or by a compiled forward pass. Start with an empty cache, or generate with use_cache=False."
        )
    if position_ids is None or position_ids.dim() != 2:
        return cache.carry
    continues = position_ids[:, 0] > 0

    def of_continued(value: torch.Tensor) -> torch.Tensor:
        mask = continues.to(value.device).expand(len(value))
        return value * mask.view(-1, *[1] * (value.dim() - 1)).to(value.dtype)

    return _each(cache.carry, of_continued)


def mask_of_tokens(attention_mask: Any, shape: tuple[int, int], past: Cache | None) -> torch.Tensor | None:
    """Which of the (B, S) new tokens are real, (T,) bool, from any mask that a model is given; None without padding.

    A mask (B, S) or (B, tokens so far) says it. One for attention (B, 1, S, keys), as `generate` prepares for static
    caches, says it too: padding does not attend to itself.

    Raises:
        MoEError: masks of which none is about all tokens so far.
    """
    if isinstance(attention_mask, dict):
        masks = {kind: mask for kind, mask in attention_mask.items() if mask is not None}
        if masks and "full_attention" not in masks:
            raise MoEError(
                f"Attention masks of {sorted(masks)} do not say which tokens are padding: use a dynamic cache, which is the "
                "default."
            )
        attention_mask = masks.get("full_attention")
    if not isinstance(attention_mask, torch.Tensor):
        return None
    length = shape[1]
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:].reshape(-1).bool()
    start = 0 if past is None else past.get_seq_length()
    place = torch.arange(length, device=attention_mask.device)
    own = attention_mask[:, 0, place, place + start]  # (B or 1, S)
    return (own if own.dtype == torch.bool else own == 0).expand(shape).reshape(-1)
