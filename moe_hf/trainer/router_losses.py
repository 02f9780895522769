"""The router losses of a MoE, entered into a training loss exactly once, whatever computes that loss.

This package's models add them in their forward pass. Those of transformers add one loss over all layers together, where
layers that collapsed on different experts look balanced, and only with `output_router_logits`; `Trainer` then multiplies
it by the accumulation steps and the processes, and a fused head, label smoothing or a loss function of one's own may
drop it. `RouterLosses` reads the routers' decisions, silences the model's own coefficient and returns what is to be
added. `MoETrainer` uses it; other trainers get it from `add_router_losses`. In a loop of one's own, for each micro-batch:

    router_losses = RouterLosses(model)  # once, before the loop
    loss = model(**batch, num_items_in_batch=count).loss + router_losses.loss(batch["labels"], count)

Letters: T tokens, E experts, K experts per token.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moe_hf.errors import MoEError
from moe_hf.finetuning.router_watch import ForwardPass, RouterDecision, RouterWatch
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.losses import LOSSES, LayerRouting, loss_coefficients, sum_over_ranks
from moe_hf.modeling.step_labels import share_of_step
from moe_hf.trainer.expert_balance import BIAS, reset_step_counts, start_counting
from moe_hf.unwrapping import transformer_of


SCOPES = ("micro_batch", "sequence", "global_batch")
# Forward passes whose losses wait to be taken; their graphs take memory.
MOST_PENDING = 64
# What models of transformers call the coefficient of their loss.
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


@dataclass(frozen=True)
class _RouterOfTransformers:
    """What the losses read of a router's configuration, for one that has no `MoEConfig`."""

    scoring_func: str
    num_experts_per_tok: int
    balance_strategy: str
    balance_loss_scope: str
    extra_experts: tuple = ()
    router_loss_kwargs: dict = field(default_factory=dict)


class RouterLosses:
    """The router losses of the forward passes of a model, until `loss` takes them.

    The load-balancing loss is taken per layer and is 1 at balance, as in this package's models; its coefficient keeps the
    strength that it has in the model: transformers' own loss is K at balance, so that it counts K times here. The
    coefficient of the model itself is 0 while its forward pass runs, and what it was at any other time, so that it is
    saved as it came.

    Args:
        model (`PreTrainedModel`): a MoE, this package's or one of transformers, in whatever wrapping.
        router_aux_loss_coef (`float`, *optional*): coefficient of the load-balancing loss, in the units of the model; by
            default `config.router_aux_loss_coef`, or 0 where the model has none. This package's models keep it in
            their configuration.
        router_z_loss_coef (`float`, *optional*): the same for the router z-loss.
        balance_loss_scope (`str`, *optional*): over which tokens the load-balancing loss is taken, as in `MoEConfig`.
            With `"global_batch"` all processes must run the same number of forward passes, and `next_step` must be
            called after each optimizer step.

    Raises:
        MoEError: a coefficient or a scope that is not allowed, or a model whose routers cannot be read.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        router_aux_loss_coef: float | None = None,
        router_z_loss_coef: float | None = None,
        balance_loss_scope: str | None = None,
    ) -> None:
        self.model = transformer_of(model)
        given = {"router_aux_loss_coef": router_aux_loss_coef, "router_z_loss_coef": router_z_loss_coef}
        _check(given, balance_loss_scope)
        self._config = self.model.config.get_text_config()
        self._is_ours = self._config.model_type == MoEConfig.model_type
        self._given = {name: value for name, value in given.items() if value is not None}
        self._scope = balance_loss_scope or "micro_batch"
        self._pending: list[tuple[dict[str, torch.Tensor], torch.Tensor | int]] = []
        self._step_counts: list[torch.Tensor] | None = None
        self._num_chosen = 1
        self._own_coefficients: list[tuple[object, str, float]] = []
        self._handles: list[RemovableHandle] = []
        self._watch: RouterWatch | None = None
        self.has_entered = False
        # Of the last forward pass, by name: the losses, unweighted, and this package's models' figures.
        self.reported: dict[str, torch.Tensor] = {}
        self.stats: dict[str, torch.Tensor] | None = None
        if self._is_ours:
            for name, value in (self._given | {"balance_loss_scope": balance_loss_scope}).items():
                if value is not None:
                    setattr(self._config, name, value)
        self.start()

    def start(self) -> None:
        """Read forward passes from now on, and silence the model's own coefficient in them."""
        if self._handles:
            return
        if self._is_ours:
            if self.is_joint:
                start_counting(self.model)
            self._follow_own_forward()
            return
        if any(self.coefficients.values()):
            self._watch = RouterWatch(self.model, self._score)
        self._handles = [
            self.model.register_forward_pre_hook(lambda *_: self._silence()),
            self.model.register_forward_hook(lambda *_: self._restore(), always_call=True),
        ]

    def stop(self) -> None:
        """Leave the model as it was: its own coefficient acts again, and nothing is read."""
        for handle in self._handles:
            handle.remove()
        if self._watch is not None:
            self._watch.remove()
        self._handles, self._watch, self._pending = [], None, []

    @contextmanager
    def silenced(self) -> Iterator[None]:
        """Keep the model's own coefficient at 0 for a while, whether forward passes are read or not."""
        self._silence()
        try:
            yield
        finally:
            self._restore()

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients by name of a loss, for losses in the units of this package: balanced is 1."""
        if self._is_ours:
            return loss_coefficients(self._config)
        held = [value for _, _, value in self._own_coefficients]
        held += [getattr(self._config, name, None) for name in COEFFICIENTS]
        own = next((value for value in held if value), 0.0)
        z = self._given.get("router_z_loss_coef", getattr(self._config, "router_z_loss_coef", 0.0))
        aux = self._given.get("router_aux_loss_coef", own)
        return {"load_balancing_loss": aux * self._num_chosen, "router_z_loss": z}

    @property
    def is_joint(self) -> bool:
        """Whether a micro-batch is that of all processes together."""
        return (self._config.balance_loss_scope if self._is_ours else self._scope) == "global_batch"

    def loss(
        self,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        *,
        shift_labels: bool = True,
    ) -> torch.Tensor | float:
        """Take the weighted router losses of the forward pass since the last call, to be added to its loss, once.

        With labels and their number in the optimizer step they count as much as the language-modelling loss of the same
        micro-batch does; multiply the sum of both by what undoes the averages of your loop. Several forward passes
        since the last call are averaged.

        Args:
            labels (`torch.Tensor`, *optional*): those of the micro-batch, -100 where nothing is predicted.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*): labels of the optimizer step on all processes.
            shift_labels (`bool`): whether the model predicts `labels[..., 1:]`.

        Returns:
            A scalar; 0.0 where they are in the model's loss already, and in evaluation.
        """
        self.has_entered = False
        if not self._pending:
            return 0.0
        pending, self._pending = self._pending, []
        coefficients = self.coefficients
        sums = [sum(coefficients[name] * value for name, value in losses.items()) for losses, _ in pending]
        if labels is not None:
            labels = ((labels[..., 1:] if shift_labels else labels) != -100).sum()
        num_tokens = sum(tokens for _, tokens in pending)
        share = share_of_step(num_tokens, labels, num_items_in_batch, joint=self.is_joint)
        share = share.to(sums[0].device) if isinstance(share, torch.Tensor) else share
        return sum(sums) / len(sums) * share

    def next_step(self) -> None:
        """Forget the choices counted so far: a new optimizer step begins."""
        self._step_counts = None
        # With a correction bias `update_correction_bias` reads the counts, and forgets them.
        if self._is_ours and self.is_joint and self._config.balance_strategy != "bias":
            reset_step_counts(self.model)

    def _silence(self) -> None:
        if self._is_ours:
            return  # it acts in their forward pass, and is right there
        for holder in (self.model, self.model.config, self._config):
            for name in COEFFICIENTS:
                value = vars(holder).get(name)
                if value:
                    self._own_coefficients.append((holder, name, value))
                    setattr(holder, name, 0.0)

    def _restore(self) -> None:
        while self._own_coefficients:
            holder, name, value = self._own_coefficients.pop()
            setattr(holder, name, value)

    def _enter(self, losses: dict[str, torch.Tensor], num_tokens: torch.Tensor | int) -> None:
        if len(self._pending) >= MOST_PENDING:
            raise MoEError(
                f"The router losses of {MOST_PENDING} forward passes were never taken: call loss() for each, or stop()."
            )
        self._pending.append((losses, num_tokens))
        self.has_entered = True

    def _score(self, watch: RouterWatch, outputs: object) -> None:
        """The losses of a forward pass of a model of transformers, from the decisions of its routers."""
        decisions = watch.decisions
        if not all(decision.has_grad for decision in decisions):
            raise MoEError(
                "use_reentrant=True loses the gradient of the router losses without a word; use "
                'gradient_checkpointing_kwargs={"use_reentrant": False}.'
            )
        layers = [self._layer(index, decision, watch.scoring_func) for index, decision in enumerate(decisions)]
        if not layers:
            return
        if self.is_joint:
            counts = [decision.choice_counts() for decision in decisions]
            before = self._step_counts or [torch.zeros_like(count) for count in counts]
            self._step_counts = [old + new for old, new in zip(before, counts, strict=True)]
            for layer, total in zip(layers, sum_over_ranks(self._step_counts), strict=True):
                layer.global_counts = total
        device = layers[0].router_logits.device
        names = [name for name, coefficient in self.coefficients.items() if coefficient]
        self.reported = {
            name: torch.stack([LOSSES[name](layer).to(device) for layer in layers]).mean() for name in names
        }
        self._enter(self.reported, watch.forward_pass.num_tokens)

    def _layer(self, index: int, decision: RouterDecision, scoring_func: str) -> LayerRouting:
        self._num_chosen = decision.routing.top_k_index.shape[-1]
        has_bias = BIAS in {**decision.router._buffers, **decision.router._parameters}
        return LayerRouting(
            config=_RouterOfTransformers(
                scoring_func=scoring_func,
                num_experts_per_tok=self._num_chosen,
                balance_strategy="bias" if has_bias else "loss",
                balance_loss_scope=self._scope,
            ),
            layer_index=index,
            router_logits=decision.router_logits,
            routing=decision.routing,
            token_mask=decision.token_mask,
            sequence_ids=decision.document_ids,
        )

    def _follow_own_forward(self) -> None:
        """Read the losses that a model of this package computed and that are in no loss: of a head without labels, or none."""
        current = ForwardPass()

        def read(module: nn.Module, args: tuple, outputs: object) -> None:
            if not current.is_step:
                return
            self.stats = outputs.get("router_stats") if isinstance(outputs, Mapping) else None
            if not any(self.coefficients.values()):
                return
            if not isinstance(outputs, Mapping) and module is self.model:
                raise MoEError("return_dict=False hides the router losses from training. Leave it unset.")
            losses = outputs.get("router_losses") if isinstance(outputs, Mapping) else None
            if losses is None:
                return
            if self.coefficients.get("policy_gradient_loss") and "policy_gradient_loss" not in losses:
                raise MoEError("policy_gradient_loss needs logits and labels in the model's own forward pass.")
            self.has_entered, self.reported = True, losses
            if outputs.get("loss") is None:
                self._enter(losses, current.num_tokens)

        modules = {id(module): module for module in (self.model, self.model.base_model)}
        self._handles = [module.register_forward_hook(read) for module in modules.values()]
        self._handles += [
            self.model.register_forward_pre_hook(current.begin, with_kwargs=True),
            self.model.register_forward_hook(current.end, always_call=True),
        ]


def _check(coefficients: dict[str, float | None], scope: str | None) -> None:
    for name, value in coefficients.items():
        if value is not None and not 0 <= value < float("inf"):
            raise MoEError(f"{name} is {value}; it must be at least 0 and finite.")
    if scope is not None and scope not in SCOPES:
        raise MoEError(f"balance_loss_scope is {scope!r}; it must be one of {list(SCOPES)}.")
