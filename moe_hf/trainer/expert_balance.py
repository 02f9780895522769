"""What happens to the load of the experts once per optimizer step: correction biases move, counts start anew.

A correction bias (`e_score_correction_bias`) is added to an expert's score when experts are chosen, not when they are
weighted. `MoEConfig(balance_strategy="bias")` gives a model one per router, and `MoETrainer` updates it. Many MoEs of
transformers (DeepSeek-V3, GLM-4.5, dots.llm1, ERNIE 4.5, ...) have it too and nothing that updates it: pass
`callbacks=[ExpertBalanceCallback()]`. In a loop of one's own:

    start_counting(model)
    for batch in batches:
        ...
        optimizer.step()
        update_correction_bias(model)

Letters: T tokens, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel, Trainer, TrainerCallback

from moe_hf.errors import MoEError
from moe_hf.finetuning.moe_blocks import CORRECTION_BIAS as BIAS
from moe_hf.finetuning.router_watch import ForwardPass
from moe_hf.modeling.losses import sum_over_ranks
from moe_hf.unwrapping import transformer_of


UPDATE_RATE = 1e-3


def bias_update(counts: torch.Tensor, rate: float) -> torch.Tensor:
    """What an update adds to the correction bias: rate * sign(mean(counts) - counts).

    Args:
        counts (`torch.Tensor`): choices per expert in one optimizer step, (E,).
        rate (`float`): in units of the scores, which are in [0, 1].

    Returns:
        (E,) float32: `rate` for experts with fewer choices than the mean, `-rate` for those with more.

    Source: Wang et al. (https://huggingface.co/papers/2408.15664).
    """
    # Times E, so that the mean of whole numbers is exact.
    return rate * torch.sign(counts.sum() - len(counts) * counts).float()


@torch.no_grad()
def update_correction_bias(model: nn.Module, rate: float | None = None) -> None:
    """Move the correction bias of each router by the choices since the last update; call it after `optimizer.step()`.

    The choices are those of real tokens in training forwards, over all micro-batches of the step and all processes,
    which must all call it. A router whose weight is frozen keeps its bias. The counts start anew.

    Args:
        model (`nn.Module`): the model, in whatever wrapping.
        rate (`float`, *optional*): by default `config.bias_update_rate`, or 0.001 for models of transformers.

    Raises:
        MoEError: the model has no correction bias, or no choice was ever counted.
    """
    owners = _bias_owners(model)
    if not owners:
        raise MoEError(f"{type(model).__name__} has no {BIAS}. Make the model with balance_strategy='bias'.")
    counts = [vars(owner).get("step_counts") for owner in owners]
    if all(count is None for count in counts):
        raise MoEError("No choice of experts was counted. Call start_counting(model), then forwards in training mode.")
    # A router that saw no token on this process takes part in the sum all the same.
    counts = [_no_counts(owner) if count is None else count for owner, count in zip(owners, counts, strict=True)]
    for owner, total in zip(owners, sum_over_ranks(counts), strict=True):
        bias = getattr(owner, BIAS)
        if bias.dtype in (torch.bfloat16, torch.float16):
            bias.data = bias.data.float()
        if not _is_frozen(owner):
            step = getattr(getattr(owner, "config", None), "bias_update_rate", UPDATE_RATE) if rate is None else rate
            bias += bias_update(total, step).to(bias.device).view_as(bias)
    reset_step_counts(model)


@torch.no_grad()
def update_router_state(model: nn.Module) -> None:
    """Let routers that follow earlier batches (`RouterSpec.state`) take in those since the last update.

    Call it after `optimizer.step()`, on all processes: what they observed is added up. `MoETrainer` calls it. A router
    whose weight is frozen keeps its state.

    Args:
        model (`nn.Module`): the model, in whatever wrapping.
    """
    # Not hasattr: adapters' wrappers pass on what the wrapped router has.
    routers = [module for module in model.modules() if vars(module).get("state_names")]
    names = sorted({name for router in routers for name in router.observed})
    zeros = {id(router): torch.zeros_like(getattr(router, router.state_names[0])) for router in routers}
    observed = [router.observed.get(name, zeros[id(router)]) for router in routers for name in names]
    totals = iter(sum_over_ranks(observed) if observed else ())
    for router in routers:
        total = {name: next(totals) for name in names}
        router.update_state({} if _is_frozen(router) else total)


def reset_step_counts(model: nn.Module) -> None:
    """Forget the choices counted so far, in every router that counts: a new optimizer step begins."""
    for module in model.modules():
        if vars(module).get("step_counts") is not None:
            module.step_counts = torch.zeros_like(module.step_counts)


def start_counting(model: nn.Module) -> list[RemovableHandle]:
    """Let every router count its choices from now on, in training forwards.

    This package's models count by themselves, those with a correction bias from the first forward on; the others do
    once this was called, which `balance_loss_scope="global_batch"` needs to score a whole optimizer step. Models of
    transformers get hooks: one on each block's experts, and one on the model itself, for the padding mask and to tell
    a forward from its recomputation by gradient checkpointing.

    Returns:
        The hooks' handles, for `stop_counting`.
    """
    model, handles, forward = transformer_of(model), [], ForwardPass()
    for module in model.modules():
        # Not hasattr: adapters' wrappers pass on what the wrapped router has.
        if "step_counts" in vars(module):
            weight = module.weight
            module.step_counts = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
            continue
        experts = module._modules.get("experts")
        owners = _bias_owners(module) if experts is not None else []
        if len(owners) == 1 and "step_counts" not in vars(owners[0]):
            handles.append(experts.register_forward_pre_hook(_CountChoices(owners[0], forward), with_kwargs=True))
    if handles:
        handles.append(model.register_forward_pre_hook(forward.begin, with_kwargs=True))
        handles.append(model.register_forward_hook(forward.end, always_call=True))
    return handles


def stop_counting(model: nn.Module, handles: list[RemovableHandle]) -> None:
    """Undo `start_counting`."""
    for handle in handles:
        handle.remove()
    for module in model.modules():
        if "step_counts" in vars(module):
            module.step_counts = None


@dataclass
class _CountChoices:
    """A hook on the experts of one block of a transformers model: adds up the choices that they are called with."""

    owner: nn.Module
    forward: ForwardPass

    def __call__(self, experts: nn.Module, args: tuple, kwargs: dict) -> None:
        if not self.forward.is_step:
            return
        index = kwargs["top_k_index"] if "top_k_index" in kwargs else args[1]  # (T, K)
        mask = self.forward.spread(self.forward.token_mask, len(index))
        real = index.new_ones(len(index)) if mask is None else mask.to(index.device, index.dtype)
        counts = vars(self.owner).get("step_counts")
        counts = _no_counts(self.owner) if counts is None else counts
        real = real[:, None].expand(index.shape).reshape(-1)
        self.owner.step_counts = counts.scatter_add(0, index.reshape(-1), real)


def _bias_owners(model: nn.Module) -> list[nn.Module]:
    """The modules that hold a correction bias, as a buffer or as a frozen parameter."""
    own = [(module, {**module._buffers, **module._parameters}.get(BIAS)) for module in model.modules()]
    return [module for module, bias in own if bias is not None]


def _no_counts(owner: nn.Module) -> torch.Tensor:
    bias = getattr(owner, BIAS)
    return torch.zeros(bias.numel(), dtype=torch.long, device=bias.device)


def _is_frozen(owner: nn.Module) -> bool:
    weight = getattr(owner, "weight", None)
    return isinstance(weight, nn.Parameter) and not weight.requires_grad


class ExpertBalanceCallback(TrainerCallback):
    """Moves the correction biases after each optimizer step, and lets the counts of a step start anew.

    `MoETrainer` adds it where the configuration asks for it; for other models, and other trainers, pass it to them.

    Args:
        rate (`float`, *optional*): as `update_correction_bias` takes it.
    """

    def __init__(self, rate: float | None = None) -> None:
        self.rate = rate
        self._handles: list[RemovableHandle] = []

    def on_train_begin(self, args, state, control, model: PreTrainedModel | None = None, **kwargs) -> None:
        """Start counting."""
        stop_counting(model, self._handles)
        self._handles = start_counting(model)

    def on_optimizer_step(self, args, state, control, model: PreTrainedModel | None = None, **kwargs) -> None:
        """Update the biases, where there are any, and forget the counts; update what else routers keep."""
        update_router_state(model)
        if _bias_owners(model):
            update_correction_bias(model, self.rate)
        else:
            reset_step_counts(model)

    def on_train_end(self, args, state, control, model: PreTrainedModel | None = None, **kwargs) -> None:
        """Stop counting."""
        stop_counting(model, self._handles)
        self._handles = []


def add_balance_callback(trainer: Trainer, model: nn.Module) -> None:
    """Add an `ExpertBalanceCallback` to the trainer of a model whose routers follow whole optimizer steps, once."""
    config = getattr(model, "config", None)
    has_bias = getattr(config, "balance_strategy", None) == "bias"
    counts_steps = getattr(config, "balance_loss_scope", None) == "global_batch"
    given = any(isinstance(callback, ExpertBalanceCallback) for callback in trainer.callback_handler.callbacks)
    keeps_state = any(vars(module).get("state_names") for module in model.modules())
    if (has_bias or counts_steps or keeps_state) and not given:
        trainer.add_callback(ExpertBalanceCallback())
