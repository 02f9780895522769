"""Distillation: a smaller MoE, or a dense model, learns from the predictions of a MoE beside the labels.

Letters: B batch, S sequence, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.metrics import IGNORED_LABEL
from moe_hf.modeling.step_labels import at_least_one
from moe_hf.trainer.arguments import FinetuneArguments
from moe_hf.trainer.moe_trainer import MoETrainer


@dataclass
class DistillationArguments(FinetuneArguments):
    """Fine-tuning arguments, and how much the teacher says."""

    scope: str | None = field(
        default="all",
        metadata={"help": "What trains: moe, experts, router, shared, non_moe, attention, ffn or all."},
    )
    kd_beta: float = field(default=1.0, metadata={"help": "Weight of the teacher's predictions beside the labels'."})
    kd_temperature: float = field(
        default=1.0, metadata={"help": "Softens both predictions; 1 leaves them as they are."}
    )
    kd_stop_step: int | None = field(
        default=None, metadata={"help": "The teacher is heard before this step only; None for the whole run."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kd_beta >= 0 or not self.kd_temperature > 0:
            raise MoEError(
                f"kd_beta={self.kd_beta}, kd_temperature={self.kd_temperature}: they must be at least 0, and above 0."
            )


def distillation_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Sum over scored tokens of temperature^2 * KL(teacher || student), in nats; float32.

    Args:
        student_logits, teacher_logits (`torch.Tensor`): (B, S, V).
        labels (`torch.Tensor`): (B, S), not shifted; position i predicts `labels[:, i + 1]`, -100 is not scored.

    Source: DeepSpeed-MoE, Mixture-of-Students (https://huggingface.co/papers/2201.05596); Hinton et al.
    (https://huggingface.co/papers/1503.02531).
    """
    total = student_logits.new_zeros((), dtype=torch.float32)
    for student, teacher, row in zip(student_logits, teacher_logits, labels, strict=True):
        # One row at a time: float32 copies of all logits would be the largest tensors of the step.
        scored = row[1:] != IGNORED_LABEL
        log_p = F.log_softmax(student[:-1][scored].float() / temperature, dim=-1)
        log_q = F.log_softmax(teacher[:-1][scored].float() / temperature, dim=-1)
        total = total + F.kl_div(log_p, log_q, log_target=True, reduction="sum")
    return temperature**2 * total


class DistillationTrainer(MoETrainer):
    """`MoETrainer` whose training loss has `kd_beta` times the mean `distillation_loss` of a token added.

    Args:
        model (`PreTrainedModel`): the student: a MoE or a dense model, with the teacher's vocabulary.
        args (`DistillationArguments`): as in [`MoETrainer`].
        teacher (`PreTrainedModel`): evaluated without gradients, without drops of its routers' training.
        kwargs: as [`MoETrainer`] takes them.

    Raises:
        MoEError: the vocabularies differ.
    """

    def __init__(self, model: PreTrainedModel, args: DistillationArguments, *, teacher: PreTrainedModel, **kwargs):
        sizes = [m.get_output_embeddings().weight.shape[0] for m in (model, teacher)]
        if sizes[0] != sizes[1]:
            raise MoEError(
                f"The student predicts {sizes[0]} tokens, the teacher {sizes[1]}; both need one vocabulary."
            )
        super().__init__(model, args, **kwargs)
        self.teacher = teacher.requires_grad_(False).eval().to(self.args.device)

    def compute_loss(
        self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None, **kwargs
    ):
        """As in `MoETrainer`; in training the teacher's predictions count too, until `kd_stop_step`."""
        labels = inputs.get("labels")
        loss, outputs = super().compute_loss(
            model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        stop = self.args.kd_stop_step
        if model.training and self.args.kd_beta > 0 and (stop is None or self.state.global_step < stop):
            with torch.no_grad():
                given = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
                teacher_logits = self.teacher(**given, use_cache=False).logits
            total = distillation_loss(outputs.logits, teacher_logits, labels, self.args.kd_temperature)
            loss = loss + self.args.kd_beta * total / self._divisor(labels, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _divisor(self, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor | float:
        """What `Trainer` divides the sum over a micro-batch's tokens by, so that the ranks' mean is the batch's."""
        if num_items_in_batch is None:
            return at_least_one((labels[:, 1:] != IGNORED_LABEL).sum())
        if not self.args.average_tokens_across_devices:
            return num_items_in_batch
        return num_items_in_batch / (self.accelerator.num_processes // self.get_tp_size())
