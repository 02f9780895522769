"""What one forward pass of the model tells its routers and experts, and what they answer.

A dense decoder layer calls its MLP with the hidden states alone, so this reaches them through a context variable.

Letters: B batch, S sequence, T = B * S tokens, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.utils import ModelOutput
from transformers.utils.import_utils import is_torchdynamo_compiling
from transformers.utils.output_capturing import CompileableContextVar

from .cache_names import cache_of
from .configuration_moe import MoEError
from .losses import LayerRouting
from .output_mixture import OutputMixture
from .routing_cache import Carry, keep_carry


# Fields of a `RoutingPass` that have one value per token, (T,).
PER_TOKEN = ("token_mask", "positions", "document_ids", "open_experts")


@dataclass
class RoutingPass:
    """What one forward pass of the model tells its routers, and, when `record`, what they answer.

    A dense decoder layer calls its MLP with the hidden states alone, so this reaches the routers through a context
    variable, which also survives the threads of data-parallel replicas and of the autograd engine.
    """

    batch_size: int = 1
    sequence_length: int = 1
    token_mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    ids: dict[str, torch.Tensor] = field(default_factory=dict)
    open_experts: torch.Tensor | None = None
    record: bool = False
    has_model: bool = False
    layers: list[LayerRouting] = field(default_factory=list)
    # In place of a mixture of outputs: the experts of the last layer apart, and what the head gets instead of running the decoder.
    mixture: OutputMixture | None = None
    replay: ModelOutput | None = None
    # With a cache: what routers carried on from earlier tokens, and what they carry on from these, by layer.
    carried: dict[int, Carry] | None = None
    carry: dict[int, Carry] = field(default_factory=dict)

    def keep_carry(self, outputs: Any) -> None:
        """Put what the routers carry on into the cache that the model returns, where it returns one."""
        if self.carry and (cache := cache_of(outputs)) is not None:
            keep_carry(cache, self.carry)

    def for_sub_tokens(self, heads: int) -> "RoutingPass":
        """The same pass as routers see it that route `heads` sub-tokens of each token; it records in the same list."""
        if heads == 1:
            return self
        per_token = {name: getattr(self, name) for name in PER_TOKEN if getattr(self, name) is not None}
        repeated = {name: values.repeat_interleave(heads, dim=0) for name, values in per_token.items()}
        repeated["ids"] = {kind: ids.repeat_interleave(heads) for kind, ids in self.ids.items()}
        return replace(self, sequence_length=self.sequence_length * heads, **repeated)

    def num_tokens(self) -> torch.Tensor | int:
        """Real tokens of the pass."""
        return self.batch_size * self.sequence_length if self.token_mask is None else self.token_mask.sum()

    def id_of(self, kind: str) -> torch.Tensor:
        """The id of each token, (T,).

        Raises:
            MoEError: the pass has none: the block was called outside of its model.
        """
        if kind not in self.ids:
            raise MoEError(
                f"The router needs {kind}_ids, which it gets from the model: call the model, not the block."
            )
        return self.ids[kind]

    def open_to_tokens(self) -> torch.Tensor:
        """Which experts are in the group of each token, (T, E) bool.

        Raises:
            MoEError: the pass does not say: the block was called outside of its model.
        """
        if self.open_experts is None:
            raise MoEError("The router needs the ids of expert_groups, which it gets from the model: call the model.")
        return self.open_experts

    def place_tokens(self, config: Any, position_ids: Any, attention_mask: Any, past: Cache | None) -> None:
        """Set `positions`: the place of each token among the real ones of its sequence or document, those of the cache counted.

        Args:
            config: of the model; nothing is done where no router takes turns.
            position_ids: those of the forward pass; (B, S) or (1, S) say it.
            attention_mask: that of the forward pass; (B, S) or (B, tokens so far) says what is padding.
            past (`Cache`): the cache, or None.
        """
        if not config.router_kwargs.get("spread_ties"):
            return
        shape = self.batch_size, self.sequence_length
        if isinstance(position_ids, torch.Tensor) and position_ids.dim() == 2:
            places = position_ids
        elif isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2:
            places = (attention_mask.long().cumsum(-1)[:, -shape[1] :] - 1).clamp_min(0)
        else:
            places = torch.arange(shape[1]) + (0 if past is None else past.get_seq_length())
        self.positions = places.expand(shape).reshape(-1)

    def positions_of_tokens(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """The place of each token in its sequence (its document, when packed), (T,)."""
        if self.positions is not None:
            return self.positions.to(device)
        return torch.arange(num_tokens, device=device) % self.sequence_length

    def sequence_ids(self, num_tokens: int, device: torch.device) -> torch.Tensor:
        """Which sequence (which document, when packed) each token belongs to, (T,), in [0, T)."""
        if self.document_ids is not None:
            return self.document_ids
        return torch.arange(num_tokens, device=device) // self.sequence_length


def document_ids_of(position_ids: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """A number for each token, (T,): equal for neighbours whose positions go on, so in one document of a packed row.

    Args:
        position_ids (`torch.Tensor`): (B, S), or (1, S) for all rows.
        shape (`tuple[int, int]`): B and S.
    """
    starts = nn.functional.pad(position_ids[:, 1:] != position_ids[:, :-1] + 1, (1, 0))
    row = torch.arange(shape[0], device=starts.device)[:, None] * shape[1]
    return (starts.cumsum(-1) + row).reshape(-1)


_ROUTING_PASS = CompileableContextVar("moe_hf_routing_pass")


def current_routing_pass() -> RoutingPass | None:
    """The forward pass that is running, or None outside one."""
    holder = _ROUTING_PASS.get()
    return None if holder is None else holder["routing_pass"]


@contextmanager
def routing_pass(value: RoutingPass):
    """Make `value` the forward pass that the routers inside see."""
    # A dict, as transformers' own values of such variables are: its model tests look at the keys.
    token = _ROUTING_PASS.set({"routing_pass": value})
    try:
        yield value
    finally:
        _ROUTING_PASS.reset(token)


def checkpointing(function: Callable) -> Callable:
    """torch's `checkpoint`, with arguments that are bound already, for layers whose routers see a forward pass.

    It is not reentrant unless that is asked for.

    Raises:
        MoEError: for `use_reentrant=True`.
    """
    given = getattr(function, "keywords", {})
    if given.get("use_reentrant"):
        raise MoEError(
            "use_reentrant=True loses the gradient of the router losses without a word; use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}, which is the default.'
        )

    def checkpointed(layer: Callable, *args, **kwargs):
        if given.get("use_reentrant") is None:
            kwargs["use_reentrant"] = False
        if not is_torchdynamo_compiling():
            # The routers see the same padding and documents again when the layer is recomputed.
            kwargs["context_fn"] = partial(recompute_contexts, given.get("context_fn"))
        return function(layer, *args, **kwargs)

    return checkpointed


def recompute_contexts(more: Callable | None = None) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Contexts for a checkpointed forward and its recomputation, which sees the same pass and records nothing.

    Args:
        more (`Callable`, *optional*): makes two further contexts, as torch's checkpoint takes it for `context_fn`.
    """
    outer = current_routing_pass() or RoutingPass()
    own = routing_pass(outer), routing_pass(replace(outer, record=False, layers=[], carry={}))
    return own if more is None else tuple(_both(*pair) for pair in zip(own, more(), strict=True))


@contextmanager
def _both(first: AbstractContextManager, second: AbstractContextManager) -> Iterator[None]:
    with first, second:
        yield
