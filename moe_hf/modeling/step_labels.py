"""What a forward pass counts for in its optimizer step, by its labels; a step that has none counts 0."""

import torch
from torch import distributed as dist
from torch import nn
from transformers.utils import logging

from .losses import sum_over_ranks


logger = logging.get_logger(__name__)


def at_least_one(count: torch.Tensor | int | None) -> torch.Tensor | int | None:
    """A number of labels to divide by: 1 for 0, so that a step that has none counts 0, where 0 / 0 is NaN."""
    if isinstance(count, torch.Tensor):
        return torch.where(count == 0, torch.ones_like(count), count)
    return 1 if count == 0 else count


def share_of_step(
    num_tokens: torch.Tensor | int,
    num_labels: torch.Tensor | int | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    joint: bool = False,
) -> torch.Tensor | float:
    """What the router losses of one forward pass count for: its labels over those of the whole optimizer step.

    They then weigh what the language-modelling loss of the same tokens does, however a batch is cut and spread.

    Args:
        num_tokens: real tokens of this forward pass on this process.
        num_labels, num_items_in_batch: labels of this forward pass, and of the optimizer step; where the latter is not
            known every forward pass counts alike, but for one that is known to have no labels.
        joint (`bool`): the micro-batch is that of all processes (`balance_loss_scope="global_batch"`): its labels are
            added up, and shared by tokens, so that means over tokens add up to the joint mean. One collective.

    Returns:
        The factor: 0 where there is nothing to learn; without labels 1, or that whose mean over processes makes the
        joint mean.
    """
    if num_labels is None:
        num_labels, num_items_in_batch = 1.0, 1.0
    elif num_items_in_batch is None:
        num_labels, num_items_in_batch = torch.as_tensor(num_labels > 0).float(), 1.0
    num_items_in_batch = at_least_one(num_items_in_batch)
    if isinstance(num_labels, torch.Tensor) and isinstance(num_items_in_batch, torch.Tensor):
        num_labels = num_labels.to(num_items_in_batch.device)
    if not (joint and dist.is_available() and dist.is_initialized()):
        return num_labels / num_items_in_batch
    tokens = torch.as_tensor(num_tokens).reshape(1).float()
    labels = torch.as_tensor(num_labels, device=tokens.device).reshape(1).float()
    all_tokens, all_labels = sum_over_ranks([tokens, labels])
    return (tokens / all_tokens.clamp_min(1) * all_labels)[0] / num_items_in_batch


def number_of_labels(named: dict, predicts_tokens: bool) -> torch.Tensor | None:
    """How many labels a forward pass with these arguments learns from; None without labels, or where they are numbers.

    Args:
        predicts_tokens (`bool`): labels are those of the next tokens, so that the first of a row is nobody's.
    """
    labels, shift_labels = named.get("labels"), named.get("shift_labels")
    if shift_labels is None and labels is not None:
        shift_labels = labels[..., 1:] if predicts_tokens else labels
    if shift_labels is None or shift_labels.is_floating_point():
        return None
    return (shift_labels != -100).sum()


def zero_without_labels(loss: torch.Tensor, num_labels: torch.Tensor | None) -> torch.Tensor:
    """`loss`, or 0 with a gradient of 0 where it is a mean over no labels, which is NaN."""
    if num_labels is None:
        return loss
    is_empty = (num_labels.to(loss.device) == 0) & loss.isnan()
    return torch.where(is_empty, torch.zeros_like(loss), loss)


class LabelWatch:
    """Says once, from the main process, that there was nothing to learn; it never waits for the device."""

    def __init__(self) -> None:
        self._on_device: torch.Tensor | None = None
        self._has_spoken = False

    def see(self, count: torch.Tensor | int) -> None:
        """Look at the labels of one more step, or of a batch; a number on a device is read when the next one comes."""
        if self._has_spoken or torch.compiler.is_compiling():
            return
        if isinstance(count, torch.Tensor) and count.device.type != "cpu":
            count, self._on_device = self._on_device, count
        # What is traced, planned or sharded has no number to look at.
        if count is None or (isinstance(count, torch.Tensor) and (type(count) is not torch.Tensor or count.is_meta)):
            return
        is_main = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        if is_main and bool(torch.as_tensor(count == 0).all()):
            self._has_spoken = True
            logger.warning(
                "A step or a batch has nothing to learn: all of its labels are -100, as where a prompt leaves no room for "
                "its answer. It counts 0, its router losses too, and an evaluation leaves it out. This is said once."
            )


def label_watch(model: nn.Module) -> LabelWatch:
    """The one watch of a model, whoever looks at its labels."""
    return vars(model).setdefault("_label_watch", LabelWatch())


def count_labels(model: nn.Module, named: dict, predicts_tokens: bool) -> torch.Tensor | None:
    """`number_of_labels` of a pass of `model`; in training, `named` gets a number of the step that can be divided by."""
    num_labels, of_step = number_of_labels(named, predicts_tokens), named.get("num_items_in_batch")
    if model.training and of_step is not None:
        named["num_items_in_batch"] = at_least_one(of_step)
    if model.training and num_labels is not None:
        label_watch(model).see(num_labels if of_step is None else of_step)
    return num_labels
