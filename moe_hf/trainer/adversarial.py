"""Adversarially robust training of router and experts in turns (AdvMoE), for language models.

The adversary moves the input embeddings by a little, to where predictions and routing change most. Experts (and all that
trains but the routers) then learn to predict the same at both places, and in the next step the routers to route the same.

Source: Zhang et al. (https://huggingface.co/papers/2308.10110), who train image networks with one router for the whole
input; per-token routers, and a perturbation of embeddings, are what a language model has instead. Their router also learns
to tell classes apart, which text has not: the language-modelling loss takes that place.

Letters: B batch, S sequence, D model width, V vocabulary, T = B * S tokens, E experts.
"""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.finetuning.scopes import find_moe_blocks, scope_parameter_names
from moe_hf.metrics import IGNORED_LABEL, token_statistics
from moe_hf.trainer.arguments import FinetuneArguments
from moe_hf.trainer.moe_trainer import MoETrainer


# Where the search for the worst perturbation starts, in parts of its largest size: at zero all its gradients are zero.
FIRST_STEP = 0.1


@dataclass
class AdversarialArguments(FinetuneArguments):
    """Fine-tuning arguments, and how strong the adversary is."""

    adv_eps: float = field(
        default=0.1,
        metadata={"help": "Largest change of an embedding's coordinate, in root mean squares of embeddings."},
    )
    adv_steps: int = field(default=2, metadata={"help": "Steps of the adversary per batch."})
    adv_expert_beta: float = field(
        default=6.0, metadata={"help": "Weight of the predictions' change, in experts' turns."}
    )
    adv_router_beta: float = field(
        default=6.0, metadata={"help": "Weight of the routing's change, in routers' turns."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.adv_steps < 1 or not all(x >= 0 for x in (self.adv_eps, self.adv_expert_beta, self.adv_router_beta)):
            raise MoEError(
                f"adv_eps={self.adv_eps}, adv_expert_beta={self.adv_expert_beta}, adv_router_beta="
                f"{self.adv_router_beta} must be at least 0, and adv_steps={self.adv_steps} at least 1."
            )


def divergence(outputs, clean) -> tuple[torch.Tensor, torch.Tensor]:
    """How far predictions and routing are from the clean ones: KL(clean || other), in nats per token, float32.

    Args:
        outputs, clean: outputs of one model with `logits` (B, S, V) and `router_logits`, per layer (T, E) or None.

    Returns:
        Means over tokens: of the predictions', and of the routing's, summed over layers (0 without routers).
    """
    predictions = _kl(outputs.logits, clean.logits)
    routers = zip(
        getattr(outputs, "router_logits", None) or (), getattr(clean, "router_logits", None) or (), strict=True
    )
    return predictions, sum((_kl(other, own) for other, own in routers), predictions.new_zeros(()))


def _kl(other: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    log_q = F.log_softmax(other.float(), dim=-1).flatten(0, -2)
    log_p = F.log_softmax(clean.detach().float(), dim=-1).flatten(0, -2)
    return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")


def attack(model: PreTrainedModel, inputs: dict, eps: float, steps: int, seed: int = 0) -> torch.Tensor:
    """The perturbation of the input embeddings that changes predictions and routing most, as far as steps of signs find it.

    Args:
        model (`PreTrainedModel`): is put into evaluation mode for the search, and no gradient of it is kept.
        inputs (`dict`): of the forward, with `input_ids` (B, S).
        eps (`float`): largest absolute value of a coordinate, in root mean squares of the embeddings.
        steps (`int`): of projected gradient ascent, of 2.5 eps / steps each (Madry et al.,
            https://huggingface.co/papers/1706.06083).

    Returns:
        (B, S, D) in the embeddings' dtype, every coordinate at most eps * their root mean square.
    """
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    limit = eps * embeddings.float().square().mean().sqrt()
    generator = torch.Generator(device=embeddings.device).manual_seed(seed)
    noise = torch.empty_like(embeddings).normal_(generator=generator).clamp(-1, 1)
    delta = FIRST_STEP * limit * noise
    given = perturbed_inputs(model, inputs)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            clean = model(**given, inputs_embeds=embeddings)
        for _ in range(steps):
            delta = delta.detach().requires_grad_(True)
            outputs = model(**given, inputs_embeds=embeddings + delta)
            (gradient,) = torch.autograd.grad(sum(divergence(outputs, clean)), delta)
            delta = (delta + 2.5 * limit / steps * gradient.sign()).clamp(-limit, limit)
    finally:
        model.train(training)
    return delta.detach()


def perturbed_inputs(model: PreTrainedModel, inputs: dict) -> dict:
    """`inputs` for a forward from embeddings, which returns no loss, and the router logits that there are."""
    left_out = ("input_ids", "labels", "num_items_in_batch")
    given = {name: value for name, value in inputs.items() if name not in left_out}
    routers = {"output_router_logits": True} if find_moe_blocks(model) else {}
    return given | {"use_cache": False} | routers


class AdversarialTrainer(MoETrainer):
    """`MoETrainer` under attack: even optimizer steps train everything in scope but the routers, odd ones the routers.

    The loss of a step is the model's own plus `adv_expert_beta` times the change of predictions, or `adv_router_beta` times
    the change of routing. A model without routers has experts' turns only. `evaluate` adds `loss_attacked`.

    Args:
        model (`PreTrainedModel`): this package's, one of transformers' MoEs, or a dense one.
        args (`AdversarialArguments`): as in [`MoETrainer`].
        kwargs: as [`MoETrainer`] takes them.
    """

    def __init__(self, model: PreTrainedModel, args: AdversarialArguments, **kwargs) -> None:
        super().__init__(model, args, **kwargs)
        self._has_routers = bool(find_moe_blocks(model))
        routers = set(scope_parameter_names(model, "router")) if self._has_routers else set()
        trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._router_parameters = [parameter for name, parameter in trained if name in routers]
        self._other_parameters = [parameter for name, parameter in trained if name not in routers]
        if self._has_routers and not (self._router_parameters and self._other_parameters):
            raise MoEError(f"scope={args.scope!r} trains routers or experts alone; in turns needs both: moe or all.")

    @property
    def is_routers_turn(self) -> bool:
        """Whether the current optimizer step trains the routers."""
        return self._has_routers and self.state.global_step % 2 == 1

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **kwargs):
        """As in `MoETrainer`; in training with what the adversary changes."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if not model.training:
            return (loss, outputs) if return_outputs else loss
        predictions, routing = self._change_under_attack(model, inputs)
        beta = self.args.adv_router_beta if self.is_routers_turn else self.args.adv_expert_beta
        change = beta * (routing if self.is_routers_turn else predictions)
        if kwargs.get("num_items_in_batch") is not None:
            # The loss is this micro-batch's part of the whole batch, the change a mean over the micro-batch.
            change = change / self.current_gradient_accumulation_steps
        loss = loss + change
        return (loss, outputs) if return_outputs else loss

    def _change_under_attack(self, model: nn.Module, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        inner = self.accelerator.unwrap_model(model)
        delta = attack(inner, inputs, self.args.adv_eps, self.args.adv_steps, seed=self.state.global_step)
        given = perturbed_inputs(inner, inputs)
        embeddings = inner.get_input_embeddings()(inputs["input_ids"]).detach()
        # In evaluation mode nothing is drawn, and routers neither count choices nor report losses a second time.
        model.eval()
        try:
            clean = model(**given, inputs_embeds=embeddings)
            return divergence(model(**given, inputs_embeds=embeddings + delta), clean)
        finally:
            model.train()

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        """As in `Trainer`; the gradients of those whose turn it is not are dropped, so that no optimizer moves them."""
        loss = super().training_step(*args, **kwargs)
        if self._has_routers:
            for parameter in self._other_parameters if self.is_routers_turn else self._router_parameters:
                parameter.grad = None
        return loss

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As in `Trainer`; `loss_attacked` is the mean loss of a token when the adversary has moved the embeddings."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        given = self.eval_dataset if eval_dataset is None else eval_dataset
        if not isinstance(given, dict):
            metrics[f"{metric_key_prefix}_loss_attacked"] = self._attacked_loss(given)
            self.log({f"{metric_key_prefix}_loss_attacked": metrics[f"{metric_key_prefix}_loss_attacked"]})
        return metrics

    def _attacked_loss(self, dataset) -> float:
        model = self.accelerator.unwrap_model(self.model).eval()
        sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for inputs in self.get_eval_dataloader(dataset):
            inputs = self._prepare_inputs(inputs)
            delta = attack(model, inputs, self.args.adv_eps, self.args.adv_steps)
            with torch.no_grad():
                embeddings = model.get_input_embeddings()(inputs["input_ids"])
                logits = model(**perturbed_inputs(model, inputs), inputs_embeds=embeddings + delta).logits
            labels = inputs["labels"]
            sums[0] += token_statistics(logits, labels)[..., 0].double().sum()
            sums[1] += (labels[:, 1:] != IGNORED_LABEL).sum()
        total, count = self.accelerator.reduce(sums).tolist()
        return total / max(count, 1.0)
