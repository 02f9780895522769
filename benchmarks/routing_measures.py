"""What a router does: the load of its experts, what it drops, how its choices differ from plain top-k, time and arithmetic.

Letters: T tokens (sub-tokens where those are routed), D model width, E experts, K experts per token.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.study import MOE
from moe_hf import update_correction_bias
from moe_hf.modeling.moe_block import Router
from moe_hf.trainer.expert_balance import update_router_state
from moe_hf.upcycling.expected_weight import recorded_weight


def routers_of(model: nn.Module) -> dict[str, Router]:
    """The routers of a model by name, bottom layer first."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Router)}


def weights_of(output: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The weight with which each token uses each expert, (T, E), from what a router returned; 0 where it does not."""
    logits, weights, index, *more = output
    token = more[0] if more and more[0] is not None else torch.arange(len(index), device=index.device)
    place = (token[:, None].expand_as(index), index)
    return torch.zeros_like(logits).index_put(place, weights.to(logits.dtype), accumulate=True)


@contextmanager
def watched(model: nn.Module, see: Callable[[str, torch.Tensor, tuple[torch.Tensor, ...]], None]):
    """Call `see(name, hidden_states, output)` for each router of `model` that runs inside."""

    def hook(name: str):
        return lambda router, arguments, output: see(name, arguments[0].detach(), tuple(output))

    handles = [router.register_forward_hook(hook(name)) for name, router in routers_of(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class LoadRecorder:
    """Adds up who uses whom over training passes, while it `is_on`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.is_on = False
        self.counts: dict[str, torch.Tensor] = {}
        self.totals: dict[str, float] = {}
        self.passes, self.dropped = 0, 0.0
        self.heads, self.num_experts = model.config.num_moe_heads, model.config.num_experts
        model.register_forward_hook(self._end)
        for name, router in routers_of(model).items():
            router.register_forward_hook(lambda router, _, output, name=name: self._see(name, tuple(output)))

    def _recording(self) -> bool:
        return self.is_on and torch.is_grad_enabled()

    def _see(self, name: str, output: tuple[torch.Tensor, ...]) -> None:
        if not self._recording():
            return
        used = weights_of(output).detach() != 0
        self.counts[name] = self.counts.get(name, 0) + used.sum(0)
        # Experts that compute: a merged one and its merging, or all that are used but those that cost nothing.
        run = used[:, : self.num_experts].sum()
        if len(output) == 5:
            run = len(used) + len(output[4].unique()) * used.shape[-1]
        found = {"tokens": len(used) / self.heads, "run": float(run), "unserved": float((~used.any(-1)).sum())}
        for key, value in found.items():
            self.totals[key] = self.totals.get(key, 0.0) + value

    def _end(self, model: nn.Module, arguments: tuple, output: Any) -> None:
        if self._recording():
            self.passes += 1
            self.dropped += float((output.router_stats or {}).get("dropped_share", 0.0))

    def result(self) -> dict[str, float]:
        """Stop, and return means over layers and passes.

        `load_cv` and `max_violation`, (max - mean) / mean, are of the tokens per expert; `dropped_share` is of the
        choices, `unserved_share` of the tokens, and `experts_per_token` counts experts that compute.
        """
        self.is_on = False
        loads = [count.double() for count in self.counts.values()]
        return {
            "load_cv": statistics.mean(float(load.std(correction=0) / load.mean()) for load in loads),
            "max_violation": statistics.mean(float(load.max() / load.mean() - 1) for load in loads),
            "dropped_share": self.dropped / self.passes,
            "unserved_share": self.totals["unserved"] / self.totals["tokens"] / self.heads,
            "experts_per_token": self.totals["run"] / self.totals["tokens"],
        }


@torch.no_grad()
def calibrate(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> list[float]:
    """Divide the experts' output by the mean sum of a token's weights on `batch`, layer by layer; return those sums.

    Where weights sum to 1 nothing changes. Where they do not, the MoE starts near the dense model all the same. What
    upcycling has divided by already, as measured on other tokens, is taken into account.
    """
    sums: dict[str, float] = {}
    model.eval()
    with watched(model, lambda name, _, output: sums.update({name: float(weights_of(output).sum(-1).mean())})):
        model(**batch, use_cache=False)
    for name, total in sums.items():
        block = model.get_submodule(name.removesuffix(".gate"))
        ratio = total / recorded_weight(model.config, block.gate.layer_index)
        if abs(ratio - 1) > 1e-3:
            block.experts.down_proj.div_(ratio)
    return list(sums.values())


def router_parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the parameters of all routers, by name."""
    return {
        f"{name}.{own}": parameter.detach().clone()
        for name, router in routers_of(model).items()
        for own, parameter in router.named_parameters(recurse=False)
    }


def router_change(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How far the routers moved, relative to what they were, and which of their parameters did not move at all."""
    moved = sum(float((after[name] - value).square().sum()) for name, value in before.items())
    size = sum(float(value.square().sum()) for value in before.values())
    still = [name for name, value in before.items() if torch.equal(after[name], value)]
    return {"relative": (moved / size) ** 0.5, "not_moved": still}


@torch.no_grad()
def choices_that_differ(
    model: PreTrainedModel, reference: PreTrainedModel | None, texts: Iterable[dict[str, torch.Tensor]]
) -> dict[str, float | None]:
    """How far the choices of `model` in training differ from plain top-k on the same hidden states, 0 to 1.

    A difference is the share that only one of both makes, of the choices (token, expert) that either makes: `rule` from
    the 2 highest logits of the model's own router, `trained` from what the routers of `reference` choose for the hidden
    states of `model`; None where the model's experts are not those of `reference`.
    """
    both, either = {"rule": 0, "trained": 0}, {"rule": 0, "trained": 0}
    others = {} if reference is None else routers_of(reference.eval())

    def add(key: str, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        both[key] += int((ours & theirs).sum())
        either[key] += int((ours | theirs).sum())

    def see(name: str, hidden_states: torch.Tensor, output: tuple[torch.Tensor, ...]) -> None:
        used = weights_of(output) != 0
        best = output[0].topk(MOE["num_experts_per_tok"], dim=-1).indices
        add("rule", used, torch.zeros_like(used).scatter(1, best, True))
        other = others.get(name)
        if other is not None and used.shape[-1] >= MOE["num_experts"]:
            theirs = weights_of(other.forward(hidden_states)) != 0
            add("trained", used, nn.functional.pad(theirs, (0, used.shape[-1] - theirs.shape[-1])))

    model.train()
    with watched(model, see):
        for text in texts:
            model(**text, use_cache=False)
    return {key: 1 - both[key] / count if count else None for key, count in either.items()}


def forward_flops(model: PreTrainedModel, block_size: int, experts_per_token: float) -> float:
    """FLOPs of one token's forward pass: 2 per weight it meets in a matrix product, and attention over a block."""
    config = model.config.get_text_config()
    weights = model.get_output_embeddings().weight.numel()
    if getattr(config, "output_mixture", None) == "likelihood":
        weights *= config.num_experts  # each predicts
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or "embed_tokens" in name or "lm_head" in name:
            continue
        is_expert = parameter.ndim == 3 and ".experts." in name
        weights += parameter.numel() * (experts_per_token / len(parameter) if is_expert else 1)
    return 2 * weights + 4 * config.num_hidden_layers * block_size * config.hidden_size


def update_routers(model: PreTrainedModel) -> None:
    """What routers that follow the load do after a step of the optimizer."""
    if not routers_of(model):
        return
    update_router_state(model)
    if model.config.balance_strategy == "bias":
        update_correction_bias(model)


def time_ratio(
    arms: list[tuple[PreTrainedModel, torch.optim.Optimizer, dict[str, torch.Tensor]]], rounds: int
) -> float:
    """CPU time of a training step of the second model over that of the first, in turns; the median of `rounds` ratios.

    Process CPU time, which does not depend on what else the machine does. Models change, as much as their optimizers'
    learning rates let them.
    """
    ratios = []
    for number in range(rounds + 1):
        seconds = []
        for model, optimizer, batch in arms:
            model.train()
            start = time.process_time()
            model(**batch, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            update_routers(model)
            seconds.append(time.process_time() - start)
        if number:  # the first one also sets things up
            ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)
