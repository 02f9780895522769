"""What the routers do while a model trains, in the log of any `Trainer` and so in every tracker that it reports to.

Letters: T tokens, E experts, K experts per token.
"""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from moe_hf.finetuning.router_watch import RouterDecision, RouterWatch, layer_label, log_scores
from moe_hf.modeling.losses import sum_over_ranks


PREFIX = "routing"
MEANS = ("max_violation", "entropy", "dropped_share")


@dataclass(frozen=True)
class LayerLoad:
    """How one router spread its tokens, over all processes.

    Attributes:
        load: (E,), choices of each expert over the mean of all: 1 is ideal.
        max_violation: the largest load minus 1; 0 at balance, E / K - 1 when K experts take all
            (https://huggingface.co/papers/2408.15664).
        entropy: mean entropy of a token's scores over the experts, in nats: ln E when undecided.
        dead_experts: experts that no token chose.
        dropped_share: choices that were not served, or have weight 0, over all choices.
    """

    load: torch.Tensor
    max_violation: float
    entropy: float
    dead_experts: int
    dropped_share: float


class LoadCounts:
    """Adds up what routers decide, on their devices, without waiting for them."""

    def __init__(self) -> None:
        # By layer: choices of each expert (E), then tokens, entropy and dropped choices.
        self._sums: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def add(self, decisions: Iterable[RouterDecision], scoring_func: str) -> None:
        """Add the decisions of one forward pass of routers that score by a `"softmax"` or a `"sigmoid"`."""
        for decision in decisions:
            scores = log_scores(decision.router_logits, scoring_func)  # (T, E)
            entropy = -(scores.exp() * scores).sum(-1)
            mask = decision.token_mask
            tokens = entropy.new_tensor(len(entropy)) if mask is None else mask.to(entropy.device).sum()
            entropy = entropy.sum() if mask is None else (entropy * mask.to(entropy.device)).sum()
            unserved = decision.routing.top_k_weights.detach() == 0
            dropped = (unserved * decision.real_choices()).sum()
            # Counts of a long window are exact in float64 only.
            dtype = torch.float32 if scores.device.type == "mps" else torch.float64
            figures = torch.stack([figure.to(dtype) for figure in (tokens, entropy, dropped)])
            sums = torch.cat([decision.choice_counts().to(dtype), figures])
            before = self._sums.get(decision.name)
            self._sums[decision.name] = sums if before is None else before + sums

    def take(self) -> dict[str, LayerLoad]:
        """The load of each layer since the last call, over all processes, which must all call it."""
        if not self._sums:
            return {}
        names, sums = list(self._sums), list(self._sums.values())
        self._sums = {}
        lengths = [len(total) for total in sums]
        joint = torch.cat([total.to(sums[0].device) for total in sum_over_ranks(sums)]).cpu()
        loads = {}
        for name, total in zip(names, joint.split(lengths), strict=True):
            counts, (tokens, entropy, dropped) = total[:-3], total[-3:].tolist()
            choices = max(float(counts.sum()), 1.0)
            load = counts * len(counts) / choices
            loads[name] = LayerLoad(
                load=load,
                max_violation=float(load.max()) - 1,
                entropy=entropy / max(tokens, 1.0),
                dead_experts=int((counts == 0).sum()),
                dropped_share=dropped / choices,
            )
        return loads


def summarise(loads: dict[str, LayerLoad], detailed: bool = False) -> dict[str, float]:
    """Figures for a log: means over the layers and the worst layer; with `detailed` also each layer and expert.

    Args:
        loads: by name of the MoE block, not empty.

    Returns:
        By name: `routing/max_violation` and `entropy` (means over layers), `dropped_share` (mean), `dead_experts` (all
        layers together), `max_violation_worst` and its `worst_layer`; detailed `routing/layer_3/...` and
        `routing/layer_3/load/5`.
    """
    layers = list(loads.values())
    mean = {field: sum(getattr(layer, field) for layer in layers) / len(layers) for field in MEANS}
    worst = max(loads, key=lambda name: loads[name].max_violation)
    label = layer_label(worst)
    logs = mean | {
        "dead_experts": sum(layer.dead_experts for layer in layers),
        "max_violation_worst": loads[worst].max_violation,
        "worst_layer": int(label) if label.isdigit() else label,
    }
    if detailed:
        for name, layer in loads.items():
            place = f"layer_{layer_label(name)}"
            logs |= {f"{place}/{field}": getattr(layer, field) for field in (*MEANS, "dead_experts")}
            logs |= {f"{place}/load/{expert}": ratio for expert, ratio in enumerate(layer.load.tolist())}
    return {f"{PREFIX}/{name}": value for name, value in logs.items()}


class RoutingTelemetryCallback(TrainerCallback):
    """Adds the load of the routers to each training log, for this package's models and those of transformers.

    `MoETrainer` has it; to another trainer, such as TRL's, give it as one of its `callbacks`. What is logged covers all
    training passes since the last log on all processes, see `summarise`.

    Args:
        detailed (`bool`): each layer's figures and each expert's load too, not only means and the worst layer.

    Raises:
        MoEError: in training, for a model whose routers cannot be read.
    """

    def __init__(self, detailed: bool = False) -> None:
        self.detailed = detailed
        self._counts = LoadCounts()
        self._watch: RouterWatch | None = None

    def on_train_begin(self, args, state, control, model: PreTrainedModel | None = None, **kwargs) -> None:
        """Start to watch the routers."""
        _call_before_trackers(self)
        self._stop()
        self._counts = LoadCounts()
        self._watch = RouterWatch(model, self._add)

    def on_log(self, args, state, control, logs: dict | None = None, **kwargs) -> None:
        """Add the figures to a training log, and to the history, which already has a copy of it."""
        if self._watch is None or logs is None or "loss" not in logs:
            return
        loads = self._counts.take()
        if loads:
            figures = summarise(loads, self.detailed)
            logs |= figures
            if state.log_history and state.log_history[-1].get("step") == state.global_step:
                state.log_history[-1] |= figures

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Stop to watch."""
        self._stop()

    def _add(self, watch: RouterWatch, outputs: object) -> None:
        if watch.decisions:
            self._counts.add(watch.decisions, watch.scoring_func)

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.remove()
        self._watch = None


def _call_before_trackers(callback: TrainerCallback) -> None:
    """Move a callback to the front of its trainer's, from one of its events.

    All callbacks see one dict of logs, in their order, and a trainer puts its trackers before the callbacks that it is
    given. An event does not say whose it is; the handler that calls it is found in the stack.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler = frame.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
            handler.callbacks.remove(callback)
            handler.callbacks.insert(0, callback)
            return
        frame = frame.f_back
