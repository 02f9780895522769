"""A forward pass on text: the loss, dead experts, saturated routers, and whether undoing a known fault lowers the loss.

Letters: B batch, S sequence, E experts, K experts per token, D model width, F expert width.
"""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report
from moe_hf.doctor.layout import inner_experts, is_concatenated, is_transposed
from moe_hf.doctor.opening import Opened
from moe_hf.errors import MoEError
from moe_hf.finetuning.moe_blocks import find_moe_blocks
from moe_hf.finetuning.router_watch import RouterWatch, layer_label
from moe_hf.inference import load_low_memory
from moe_hf.router_outputs import find_routers
from moe_hf.unwrapping import unwrapped
from moe_hf.upcycling.on_disk.layerwise import load_layerwise
from moe_hf.upcycling.probe import SATURATED, RoutingRecorder
from moe_hf.upcycling.router_init.hidden_states import check_token_ids
from moe_hf.upcycling.sample_text import sample_text, tokenizer_of


# What undoing a fault must gain, in nats/token, over all layers: this much, or this part of the loss; and in one layer. Noise of
# healthy models is far below.
GAIN, SHARE, GAIN_OF_A_LAYER = 0.5, 0.25, 0.1
# A loss that knows something: below a uniform guess by this much.
BELOW_UNIFORM = 0.1
MOST_BYTES = 8 << 30
FEW_TOKENS = 256
UNDONE = {
    "gate-up-swapped": "with gate and up exchanged",
    "transposed": "with square matrices transposed",
    "interleaved": "with the rows of gate and up laid the other way",
    "experts-permuted": "with experts in another order",
    "routing-config-changed": "with norm_topk_prob the other way",
}


def look_at_text(report: Report, opened: Opened, source: Any, data: str | os.PathLike | torch.Tensor) -> None:
    """Run the model on text or token ids, and add what is found.

    Raises:
        MoEError: the text cannot be read, or the ids are none.
    """
    if opened.config is None:
        report.add(
            NOTE, "not-examined", "A GGUF file with experts is not run: give the checkpoint that it was made from."
        )
        return
    broken = [finding.code for finding in report.errors if finding.code.endswith(("-missing", "-shape", "-unmapped"))]
    if broken:
        report.add(
            NOTE, "not-examined", f"The model was not run, since it would be drawn at random in part ({broken[0]})."
        )
        return
    ids = _token_ids(opened, data)
    model, whole = _load(opened, source)
    was_training = model.training
    model.eval()
    try:
        loss = _look_at_routing(report, model, ids)
        if not math.isfinite(loss):
            report.add(
                ERROR,
                "loss-not-finite",
                f"The loss on {ids.numel()} tokens is {loss}: the model computes nothing of use.",
            )
        else:
            uniform = math.log(opened.config.get_text_config().vocab_size)
            report.add(
                NOTE,
                "loss-told",
                f"The loss on {ids.numel()} tokens is {loss:.3f} nats/token; a uniform guess has {uniform:.3f}.",
                figure=loss,
            )
            if whole:
                _try_to_undo(report, model, ids, loss, uniform)
    finally:
        model.train(was_training)
    report.examined["tokens run"] = ids.numel()


def _token_ids(opened: Opened, data: str | os.PathLike | torch.Tensor) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        check_token_ids("data", data)
        return data
    source = opened.folder if opened.folder is not None else opened.model
    text = sample_text(opened.config.get_text_config(), lambda: tokenizer_of(source), data=Path(data))
    if text is None:
        raise MoEError(f"{opened.name} has no tokenizer to read {data} with: give token ids.")
    return text.input_ids


def _load(opened: Opened, source: Any) -> tuple[PreTrainedModel, bool]:
    """The model, and whether its weights are all in memory and may be moved about."""
    if not isinstance(source, str | os.PathLike):
        return unwrapped(source), True
    if opened.model is not None and opened.model.device.type != "meta":
        return load_low_memory(source), False
    size = sum(spec.nbytes for spec in opened.tensors.tensors.values())
    if size > MOST_BYTES or getattr(opened.config, "quantization_config", None):
        return load_layerwise(source), False
    return AutoModelForCausalLM.from_pretrained(source, dtype="auto"), True


@torch.no_grad()
def loss_of(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """The mean loss of next tokens in nats/token, in float32."""
    device = "cpu" if model.device.type == "meta" else model.device
    total, count = 0.0, 0
    for row in ids.to(device):
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1].float()
        total += float(nn.functional.cross_entropy(logits, row[1:], reduction="sum"))
        count += len(row) - 1
    return total / max(count, 1)


def _look_at_routing(report: Report, model: PreTrainedModel, ids: torch.Tensor) -> float:
    recorder, reach = RoutingRecorder(), _Reach()
    watch = None
    try:
        watch = RouterWatch(model, reach, training_only=False)
        with recorder.watch(model):
            loss = loss_of(model, ids)
    except MoEError as error:
        report.add(NOTE, "not-examined", f"What the routers do was not seen: {error}")
        return loss_of(model, ids)
    finally:
        if watch is not None:
            watch.remove()
    probe = recorder.result()
    layers = [_layer(name) for name in probe.saturated]
    if layers:
        report.add(
            WARNING,
            "router-saturated",
            f"The first choice has a mean probability of {max(probe.top_1_probability):.3f}, above {SATURATED}: the other experts get hardly "
            "any gradient.",
            layers=layers,
            part="router",
            figure=max(probe.top_1_probability),
        )
    missed = probe.never_reached
    dead = {_layer(name): reach.never_near(name, experts) for name, experts in missed.items()}
    dead = {layer: experts for layer, experts in dead.items() if experts}
    if dead:
        report.add_by_layer(
            WARNING,
            "expert-dead",
            dead,
            f"None of {probe.num_tokens} tokens chose these experts or came near it: they are dead weight. Remove them "
            "(moe-hf remove-experts), or train the routers with a balance loss.",
        )
    return loss


class _Reach:
    """The best rank that each expert had for any token."""

    def __init__(self) -> None:
        self._best: dict[str, torch.Tensor] = {}

    def __call__(self, watch: RouterWatch, outputs: Any) -> None:
        for decision in watch.decisions:
            ranks = decision.router_logits.argsort(dim=-1, descending=True).argsort(dim=-1).min(0).values
            before = self._best.get(decision.name)
            self._best[decision.name] = ranks if before is None else torch.minimum(before, ranks)

    def never_near(self, name: str, experts: list[int]) -> list[int]:
        """Those of some experts that were never in the better half."""
        best = self._best.get(name)
        return experts if best is None else [e for e in experts if best[e] >= len(best) // 2]


def _layer(name: str) -> int:
    label = layer_label(name)
    return int(label) if label.isdigit() else 0


@torch.no_grad()
def _try_to_undo(report: Report, model: PreTrainedModel, ids: torch.Tensor, loss: float, uniform: float) -> None:
    """Undo one known fault after another, in all layers and then in each; the model is left as it was."""
    if any(finding.code in UNDONE for finding in report.errors):
        return
    blocks = {name: inner_experts(block) for name, block in find_moe_blocks(model).items()}
    for code, apply, undo in _faults(model):
        gain = loss - _loss_with(model, list(blocks.values()), apply, undo, ids)
        if gain > min(GAIN, max(GAIN_OF_A_LAYER, SHARE * loss)) and loss - gain < uniform - BELOW_UNIFORM:
            _add_undone(report, code, gain, loss, [_layer(name) for name in blocks])
            return
    few = ids[:1, :FEW_TOKENS]
    start = loss_of(model, few)
    for code, apply, undo in _faults(model):
        gains = {name: start - _loss_with(model, [experts], apply, undo, few) for name, experts in blocks.items()}
        found = {n: g for n, g in gains.items() if g > max(GAIN_OF_A_LAYER, 0.05 * start) and start < uniform + GAIN}
        if found:
            _add_undone(report, code, max(found.values()), start, [_layer(name) for name in found])
            return


def _add_undone(report: Report, code: str, gain: float, loss: float, layers: list[int]) -> None:
    report.add(
        ERROR,
        code,
        f"The loss falls from {loss:.2f} to {loss - gain:.2f} nats/token {UNDONE[code]}: the checkpoint lies otherwise than this family "
        "reads it. Convert again.",
        layers=layers,
        figure=gain,
    )


def _loss_with(model: PreTrainedModel, experts: list[nn.Module], apply: Callable, undo: Callable, ids) -> float:
    done = []
    try:
        for module in experts:
            if apply(module):
                done.append(module)
        return loss_of(model, ids) if done else math.inf
    finally:
        for module in done:
            undo(module)


def _faults(model: PreTrainedModel) -> Iterator[tuple[str, Callable[[nn.Module], bool], Callable[[nn.Module], bool]]]:
    width = model.config.get_text_config().hidden_size
    yield "gate-up-swapped", lambda e: _reorder(e, width, _swapped), lambda e: _reorder(e, width, _swapped)
    yield "interleaved", lambda e: _reorder(e, width, _woven), lambda e: _reorder(e, width, _unwoven)
    yield "interleaved", lambda e: _reorder(e, width, _unwoven), lambda e: _reorder(e, width, _woven)
    yield "transposed", _turned, _turned
    yield "experts-permuted", _reversed, _reversed
    yield "experts-permuted", lambda e: _rotated(e, 1), lambda e: _rotated(e, -1)
    yield "experts-permuted", lambda e: _rotated(e, -1), lambda e: _rotated(e, 1)
    flip = _norm_flip(model)
    if flip is not None:
        yield "routing-config-changed", flip, flip


def _swapped(size: int, together: bool) -> torch.Tensor:
    rows = torch.arange(size)
    return rows.roll(size // 2) if together else rows.view(-1, 2).flip(1).flatten()


def _woven(size: int, together: bool) -> torch.Tensor:
    return torch.arange(size).view(2, -1).t().flatten()


def _unwoven(size: int, together: bool) -> torch.Tensor:
    return torch.arange(size).view(-1, 2).t().flatten()


def _reorder(experts: nn.Module, width: int, order: Callable[[int, bool], torch.Tensor]) -> bool:
    weight = getattr(experts, "gate_up_proj", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 3:
        return False
    dimension = 2 if is_transposed(experts, width) else 1
    index = order(weight.shape[dimension], is_concatenated(experts)).to(weight.device)
    for expert in weight.data:
        expert.copy_(expert.index_select(dimension - 1, index))
    bias = getattr(experts, "gate_up_proj_bias", None)
    if isinstance(bias, torch.Tensor):
        bias.data.copy_(bias.data.index_select(-1, index))
    return True


def _turned(experts: nn.Module) -> bool:
    square = [p for p in experts.parameters(recurse=False) if p.ndim == 3 and p.shape[1] == p.shape[2]]
    for parameter in square:
        for expert in parameter.data:
            expert.copy_(expert.t().clone())
    return bool(square)


def _reversed(experts: nn.Module) -> bool:
    for parameter in experts.parameters(recurse=False):
        parameter.data.copy_(parameter.data.flip(0))
    return True


def _rotated(experts: nn.Module, by: int) -> bool:
    for parameter in experts.parameters(recurse=False):
        parameter.data.copy_(parameter.data.roll(by, 0))
    return True


def _norm_flip(model: PreTrainedModel) -> Callable[[nn.Module], bool] | None:
    """Exchange whether the weights of a token are divided by their sum, where the routers keep that as a field."""
    blocks, routers = find_moe_blocks(model), find_routers(model)
    own = {id(inner_experts(blocks[name])): router for name, router in routers.items() if name in blocks}
    if not own or not all(isinstance(getattr(router, "norm_topk_prob", None), bool) for router in own.values()):
        return None

    def flip(experts: nn.Module) -> bool:
        router = own.get(id(experts))
        if router is not None:
            router.norm_topk_prob = not router.norm_topk_prob
        return router is not None

    return flip
