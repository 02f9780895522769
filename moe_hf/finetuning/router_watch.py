"""Sees what the routers of a model decide, in this package's models and in those of transformers, whatever calls them.

Hooks on the routers see a decision even where a fused head returns no router logits. They belong to one forward pass of
the whole model: what gradient checkpointing computes again is not seen, and evaluation only where it is asked for.

Letters: T tokens, E experts, K experts per token, R rows.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.hooks import RemovableHandle

from moe_hf.errors import MoEError
from moe_hf.finetuning.moe_blocks import find_moe_blocks
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.routing import Routing, router_scores
from moe_hf.modeling.routing_pass import document_ids_of
from moe_hf.router_outputs import ROUTER_NAMES
from moe_hf.unwrapping import transformer_of


@dataclass(frozen=True)
class RouterDecision:
    """What one router decided in one forward pass.

    Attributes:
        name: the module of its block, such as `model.layers.3.mlp`.
        router: the module.
        router_logits: raw logits, (T, E).
        routing: the choice: (T, K), or (R, 1) with a `token_index`.
        token_mask: (T,), True for real tokens; None without padding.
        document_ids: (T,), equal for tokens of one document, or of one row.
        has_grad: whether gradients were on while it decided; reentrant checkpointing turns them off.
    """

    name: str
    router: nn.Module
    router_logits: torch.Tensor
    routing: Routing
    token_mask: torch.Tensor | None
    document_ids: torch.Tensor | None
    has_grad: bool

    def real_choices(self) -> torch.Tensor:
        """Which choices are of real tokens, in the shape of `routing.top_k_index`, int64."""
        index, token = self.routing.top_k_index, self.routing.token_index
        if self.token_mask is None:
            return torch.ones_like(index)
        real = self.token_mask.to(index.device, index.dtype)
        return (real if token is None else real[token])[:, None].expand(index.shape)

    def choice_counts(self) -> torch.Tensor:
        """Choices per expert by real tokens, (E,), int64."""
        counts = torch.zeros(self.router_logits.shape[-1], dtype=torch.long, device=self.router_logits.device)
        return counts.scatter_add(0, self.routing.top_k_index.reshape(-1), self.real_choices().reshape(-1))


@dataclass
class ForwardPass:
    """The forward pass of a model that runs, seen from its outside: its two methods are hooks on the model."""

    is_step: bool = False
    token_mask: torch.Tensor | None = None
    document_ids: torch.Tensor | None = None
    num_tokens: torch.Tensor | int = 0
    names: tuple[str, ...] = field(default=(), repr=False)

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note whether it is part of a training step, and which of its tokens are real."""
        self.is_step = model.training and torch.is_grad_enabled()
        if len(args) > 1 and not self.names:
            self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]
            self.names = getattr(model, "_forward_names", None) or self.names
        named = dict(zip(self.names or ("input_ids",), args, strict=False)) | kwargs
        tokens = named.get("input_ids")
        tokens = named.get("inputs_embeds") if tokens is None else tokens
        self.token_mask = self.document_ids = None
        if tokens is None:
            return
        rows, length = tokens.shape[:2]
        mask, position_ids = named.get("attention_mask"), named.get("position_ids")
        row = torch.arange(rows, device=tokens.device) * length
        self.document_ids, self.num_tokens = row.repeat_interleave(length), rows * length
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            self.token_mask = mask[:, -length:].reshape(-1).bool()
            self.num_tokens = self.token_mask.sum()
        elif mask is None and isinstance(position_ids, torch.Tensor) and position_ids.dim() == 2 and length > 1:
            self.document_ids = document_ids_of(position_ids, (rows, length))

    def end(self, model: nn.Module, args: tuple, output: object) -> None:
        """The pass is over: what routers do from now on is a recomputation."""
        self.is_step, self.token_mask, self.document_ids = False, None, None

    def spread(self, values: torch.Tensor | None, num_rows: int) -> torch.Tensor | None:
        """Values per token for a router that decides about `num_rows` tokens, or about as many parts of each.

        Raises:
            MoEError: the routers see other tokens than the model was given.
        """
        if values is None or len(values) == num_rows:
            return values
        if num_rows % len(values):
            raise MoEError(f"{num_rows} tokens were routed, and the attention mask is about {len(values)}.")
        return values.repeat_interleave(num_rows // len(values))


class RouterWatch:
    """Collects the `decisions` of the routers of a model in a forward pass.

    Args:
        model (`nn.Module`): a MoE, before or after wrapping; adapters around it are looked through.
        on_forward (callable, *optional*): called with `(watch, outputs)` after each such pass.
        training_only (`bool`): see the passes of training steps alone, not evaluation.

    Raises:
        MoEError: the model has no MoE block, or one whose router does not return raw logits, weights and choices.
    """

    def __init__(
        self,
        model: nn.Module,
        on_forward: Callable[["RouterWatch", object], None] | None = None,
        *,
        training_only: bool = True,
    ) -> None:
        self.model, self.training_only = transformer_of(model), training_only
        self.forward_pass, self.decisions = ForwardPass(), []
        self._on_forward, self._scoring_func = on_forward, None
        routers = find_routers(self.model)
        self._handles: list[RemovableHandle] = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.model.register_forward_hook(self._end),
            self.model.register_forward_hook(self.forward_pass.end, always_call=True),
        ]
        for name, router in routers.items():
            self._handles.append(router.register_forward_hook(_NoteDecision(name, self)))

    @property
    def scoring_func(self) -> str:
        """How the routers turn logits into scores, `"softmax"` or `"sigmoid"`; known once they have decided."""
        if self._scoring_func is None:
            first = self.decisions[0]
            config = getattr(first.router, "config", None)
            is_ours = isinstance(config, MoEConfig)
            self._scoring_func = config.scoring_func if is_ours else scoring_of(first)
        return self._scoring_func

    @property
    def sees_pass(self) -> bool:
        """Whether the decisions of the forward pass that runs are collected."""
        return self.forward_pass.is_step or not self.training_only

    def _begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        self.decisions.clear()
        self.forward_pass.begin(model, args, kwargs)

    def _end(self, model: nn.Module, args: tuple, output: object) -> None:
        if self.sees_pass and self._on_forward is not None:
            self._on_forward(self, output)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.decisions = [], []


@dataclass
class _NoteDecision:
    """A hook on one router."""

    name: str
    watch: RouterWatch

    def __call__(self, router: nn.Module, args: tuple, output: object) -> None:
        current = self.watch.forward_pass
        if not self.watch.sees_pass:
            return
        if not (isinstance(output, tuple) and len(output) >= 3 and not output[2].is_floating_point()):
            raise MoEError(
                f"{type(router).__name__} of {self.name!r} does not return (router_logits, weights, choices) as the "
                "routers of transformers do, so its losses and its load cannot be read. To train it, set "
                "router_aux_loss_coef=0 and routing_telemetry='off'."
            )
        logits, weights, index = output[:3]
        token_index = output[3] if len(output) > 3 else None
        self.watch.decisions.append(
            RouterDecision(
                name=self.name,
                router=router,
                router_logits=logits,
                routing=Routing(index, weights, token_index=token_index),
                token_mask=current.spread(current.token_mask, len(logits)),
                document_ids=current.spread(current.document_ids, len(logits)),
                has_grad=torch.is_grad_enabled(),
            )
        )


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model, by the name of their block, in the order of the layers.

    Raises:
        MoEError: there is no MoE block, or one without a router of its own.
    """
    routers = {}
    for name, block in find_moe_blocks(model).items():
        children = dict(block.named_children())
        found = [children[child] for child in ROUTER_NAMES if child in children]
        if not found:
            raise MoEError(
                f"The MoE block {name!r} ({type(block).__name__}) has no router of its own, named gate or router, whose "
                "decisions could be read. To train it, set router_aux_loss_coef=0 and routing_telemetry='off'."
            )
        routers[name] = found[0]
    if not routers:
        raise MoEError(f"{type(model).__name__} has no MoE block. Upcycle a dense model first.")
    return routers


def layer_label(name: str) -> str:
    """The number of the layer in a module's name, or the name itself."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", name)
    return numbers[-1] if numbers else name


@torch.compiler.disable
def scoring_of(decision: RouterDecision) -> str:
    """Whether a router of transformers turns logits into weights by a `"softmax"` or a `"sigmoid"`.

    Read from the weights that it gave; where neither explains them it is a softmax, as in transformers' own loss.

    Raises:
        MoEError: what it returns as logits are probabilities.
    """
    logits = decision.router_logits.detach().float()
    index, weights = decision.routing.top_k_index, decision.routing.top_k_weights.detach().float()
    if are_probabilities(logits):
        raise MoEError(f"{type(decision.router).__name__} returns probabilities in the place of raw router logits.")
    errors = {}
    for name in ("softmax", "sigmoid"):
        scores = router_scores(logits, name).gather(-1, index)
        if index.shape[-1] > 1:
            scores, given = (x / x.sum(-1, keepdim=True).clamp_min(1e-20) for x in (scores, weights))
        else:
            given = weights
        errors[name] = float((scores - given).abs().mean())
    is_sigmoid = errors["sigmoid"] < min(errors["softmax"], 1e-2)
    return "sigmoid" if is_sigmoid else "softmax"


def are_probabilities(router_logits: torch.Tensor) -> bool:
    """Whether what a router returns as its logits, (T, E), already went through a softmax."""
    logits = router_logits.detach().float()
    return bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-3).all())


def log_scores(router_logits: torch.Tensor, scoring_func: str) -> torch.Tensor:
    """Logarithms of a token's scores as parts of 1, (T, E) float32, of a `"softmax"` or a `"sigmoid"`."""
    logits = router_logits.detach().float()
    # A softmax of ln(sigmoid) is a sigmoid divided by its sum.
    return (logsigmoid(logits) if scoring_func == "sigmoid" else logits).log_softmax(-1)
