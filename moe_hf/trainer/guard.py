"""Stops a run at a loss or a gradient that is not finite, before the optimizer takes it into the weights."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, TrainerCallback

from moe_hf.errors import MoEError


class NotFiniteError(MoEError):
    """A loss or a gradient that is not finite: the run diverged."""


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor that may be spread over processes; it shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def check_finite(
    model: nn.Module,
    step: int,
    losses: Iterable[torch.Tensor] = (),
    *,
    gradients: bool = True,
    norms: dict[str, torch.Tensor] | None = None,
) -> None:
    """Refuse losses and gradients that are not finite; call it before `optimizer.step()`, on all processes.

    It reads the gradients once and waits for the device once.

    Args:
        model (`nn.Module`): with the gradients of the step.
        step (`int`): the optimizer step that is about to be taken, from 1.
        losses (iterable of `torch.Tensor`): those of the micro-batches of the step, scalars.
        gradients (`bool`): check the gradients too; leave them to the loss scaler of float16, which skips such steps.
        norms (`dict[str, torch.Tensor]`, *optional*): the gradients' norms by name of the parameter, where they are
            known already; clipping, and `Trainer` when it takes their joint norm, spreads a NaN over all gradients.

    Raises:
        NotFiniteError: with the step and the layer, in all processes if it is so in one.
    """
    if norms is None:
        norms = _gradient_norms(model) if gradients else {}
    losses = [loss.float().reshape(()) for loss in losses]
    values = [*losses, *norms.values()]
    if not values:
        return
    joint = torch.stack([value.to(values[0].device) for value in values])
    is_bad = (~joint.isfinite()).any().float()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(is_bad, op=dist.ReduceOp.MAX)
    if not is_bad:
        return
    numbers = joint.tolist()
    lost = [number for number in numbers[: len(losses)] if not _is_finite(number)]
    names = [name for name, number in zip(norms, numbers[len(losses) :], strict=True) if not _is_finite(number)]
    raise NotFiniteError(_describe(model, step, lost, names))


def _gradient_norms(model: nn.Module) -> dict[str, torch.Tensor]:
    """The norm of what this process holds of each gradient, by name of the parameter, float32."""
    groups: dict[tuple, list[tuple[str, torch.Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = local_part(parameter.grad)
            groups.setdefault((gradient.device, gradient.dtype), []).append((name, gradient))
    norms = {}
    for group in groups.values():
        names, tensors = zip(*group, strict=True)
        wide = torch.promote_types(tensors[0].dtype, torch.float32)
        norms |= zip(names, torch._foreach_norm(list(tensors), dtype=wide), strict=True)
    return {name: norm.float() for name, norm in norms.items()}


def _is_finite(number: float) -> bool:
    return abs(number) < float("inf")


def _describe(model: nn.Module, step: int, losses: list[float], names: list[str]) -> str:
    advice = "No weight was changed by this step. Lower the learning rate or look at the data of the step."
    if losses:
        broken = [name for name, p in model.named_parameters() if not bool(local_part(p).isfinite().all())]
        where = f"; the weights of {broken[0]} are not finite" if broken else ", though all weights are finite"
        return f"The loss is {losses[0]} at step {step}{where}. {advice}"
    if not names:
        return f"Another process has a loss or a gradient that is not finite at step {step}. {advice}"
    # A backward pass runs from the last layer to the first, and what is not finite spreads on its way.
    names = [name for name, _ in model.named_parameters() if name in set(names)]
    where = f"the gradient of {names[-1]} is not finite at step {step}"
    if len(names) > 1:
        where += f", and those of {len(names) - 1} parameters of this and earlier layers"
    return f"{where[0].upper()}{where[1:]}. {advice}"


class FiniteGuardCallback(TrainerCallback):
    """Stops any `Trainer` before an optimizer step whose gradients are not finite; `MoETrainer` does so by itself.

    It looks at each gradient when the backward pass has it, since `Trainer` spreads a NaN over all of them before its
    callbacks are called. A loss that is not finite shows in the gradients. With float16 the loss scaler skips such steps,
    and the guard stays out of it.
    """

    def __init__(self) -> None:
        self._norms: dict[str, torch.Tensor] = {}
        self._handles: list[RemovableHandle] = []

    def on_train_begin(self, args, state, control, model: PreTrainedModel | None = None, **kwargs) -> None:
        """Start to look at gradients."""
        self._stop()
        if args.fp16:
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(partial(self._note, name)))

    def on_pre_optimizer_step(self, args, state, control, model: PreTrainedModel | None = None, **kwargs) -> None:
        """Check the gradients of the step."""
        if not args.fp16:
            check_finite(model, state.global_step + 1, norms=self._norms or None)
        self._norms = {}

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Stop to look."""
        self._stop()

    @torch.no_grad()
    def _note(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self._norms[name] = torch.linalg.vector_norm(local_part(parameter.grad), dtype=torch.float32)

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._norms = [], {}
