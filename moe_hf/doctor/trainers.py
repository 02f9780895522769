"""`examine_trainer`: what a training run would do, found in one step that changes nothing.

Letters: B batch, S sequence, E experts.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from moe_hf.data import check_packing
from moe_hf.doctor.config_fields import first_of
from moe_hf.doctor.dry_step import DryStep, dry_step
from moe_hf.doctor.findings import ERROR, NOTE, WARNING, Report, layer_numbers
from moe_hf.doctor.names import listed
from moe_hf.errors import MoEError
from moe_hf.finetuning.moe_blocks import find_moe_blocks
from moe_hf.finetuning.router_watch import transformer_of
from moe_hf.finetuning.trained_tensors import lost_names, trained_tensors
from moe_hf.inspection import EXPERTS_PER_TOKEN_NAMES
from moe_hf.router_outputs import find_routers
from moe_hf.trainer.moe_trainer import MoETrainer


IGNORED = -100
# Of numbers that a step of the size of the learning rate does not move.
MOST_UNMOVED = 0.5
# A router that the language model's loss reaches has a gradient above this part of its experts'.
REACHED = 1e-6


def examine_trainer(trainer: Trainer) -> Report:
    """Take one step of a trainer and take it back: what trains, what gets a gradient, what a checkpoint would keep.

    Weights, gradients, random numbers and the optimizer are as before. The first batch of the trainer is run forward and backward,
    twice where routers train.

    Args:
        trainer (`Trainer`): `MoETrainer`, transformers' `Trainer` or one of TRL's, before `train()`, in one process.

    Returns:
        [`Report`].

    Raises:
        MoEError: it is no trainer, or has no model or data to train on.
    """
    if not isinstance(trainer, Trainer):
        raise MoEError(
            f"{type(trainer).__name__} is no Trainer: give MoETrainer, transformers' Trainer or one of TRL's."
        )
    if trainer.train_dataset is None:
        raise MoEError("The trainer has no train_dataset: give it one, or leave the examination out.")
    report = Report(type(trainer).__name__, "trainer")
    model = trainer.model
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    report.examined["parameters that train"] = sum(p.numel() for p in trains.values())
    if not trains:
        report.add(ERROR, "nothing-trains", "No parameter requires gradients: choose a scope, or add adapters.")
        return report
    _look_at_parts(report, trainer, model, trains)
    _look_at_optimizer(report, trainer, trains)
    _look_at_resolution(report, trainer, trains)
    routers = _router_names(model, trains)
    try:
        step = dry_step(trainer, routers)
    except MoEError as error:
        report.add(ERROR, "balance-loss-silent", f"The step fails: {error}")
        return report
    report.examined["tokens of the step"] = _count(step.batch)
    _look_at_gradients(report, step, trains)
    _look_at_routers(report, trainer, model, step)
    _look_at_labels(report, step)
    _look_at_documents(report, trainer, model, step)
    return report


def _part(name: str) -> str:
    if "lora_" in name or ".lora." in name:
        return "adapters"
    if ".experts." in name:
        return "experts"
    words = {"router": "routers", "gate.weight": "routers", "shared": "shared experts", "attn": "attention"}
    words |= {
        "attention": "attention",
        "norm": "norms",
        "embed": "embeddings and head",
        "lm_head": "embeddings and head",
    }
    return next((part for word, part in words.items() if word in name), "the rest")


def _look_at_parts(report: Report, trainer: Trainer, model: nn.Module, trains: dict[str, nn.Parameter]) -> None:
    counts = Counter()
    for name, parameter in trains.items():
        counts[_part(name)] += parameter.numel()
    text = ", ".join(f"{part} {count:,}" for part, count in counts.most_common())
    lost = lost_names(transformer_of(model) if not hasattr(model, "peft_config") else model)
    whole = isinstance(trainer, MoETrainer)
    kept = "its checkpoints hold all of it" if whole or not lost else "not all of it would be kept"
    report.add(NOTE, "trains", f"What trains: {text}; {kept}.", figure=sum(counts.values()))
    if lost and not whole:
        report.add_by_name(
            ERROR,
            "trained-not-saved",
            lost,
            f"{listed(lost)} train, and a checkpoint of {type(trainer).__name__} would not bring them back. Use MoETrainer, or "
            "moe_hf.save_trained.",
        )
    unseen = [name for name in trained_tensors(model) if name.endswith("e_score_correction_bias")]
    if unseen:
        report.add(NOTE, "trains", f"Correction biases move without gradients: {listed(unseen)}.", figure=len(unseen))


def _look_at_optimizer(report: Report, trainer: Trainer, trains: dict[str, nn.Parameter]) -> None:
    had, skip = trainer.optimizer, getattr(trainer.args, "skip_idle_experts", None)
    if skip:
        trainer.args.skip_idle_experts = False
    try:
        optimizer = trainer.optimizer or trainer.create_optimizer() or trainer.optimizer
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    finally:
        trainer.optimizer = had
        if skip:
            trainer.args.skip_idle_experts = skip
    absent = [name for name, parameter in trains.items() if id(parameter) not in held]
    if absent:
        report.add_by_name(
            ERROR,
            "not-in-optimizer",
            absent,
            f"{listed(absent)} require gradients and are in no group of the optimizer: they never move. Make the optimizer after the "
            "scope is chosen, of all that trains.",
        )


def _look_at_resolution(report: Report, trainer: Trainer, trains: dict[str, nn.Parameter]) -> None:
    rate = trainer.args.learning_rate
    if not isinstance(rate, float) or rate <= 0 or "adam" not in str(trainer.args.optim).lower():
        return
    stuck = {}
    for name, parameter in trains.items():
        if parameter.dtype not in (torch.bfloat16, torch.float16) or parameter.ndim < 2:
            continue
        sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 4096)].float()
        # A step of Adam is about the rate; half a unit in the last place is what rounding swallows.
        unit = torch.finfo(parameter.dtype).eps * 2 ** sample.abs().clamp_min(1e-30).log2().floor()
        unmoved = float((rate < unit / 2).float().mean())
        if unmoved > MOST_UNMOVED:
            stuck[name] = unmoved
    if stuck:
        dtype = str(next(iter(trains[name].dtype for name in stuck))).removeprefix("torch.")
        report.add(
            WARNING,
            "update-below-resolution",
            f"{listed(stuck)} are in {dtype}, and a step of {rate:.1e} is less than half a unit in the last place for "
            f"{max(stuck.values()):.0%} of their numbers: it rounds to nothing. Train float32 masters (MoETrainer's default), or raise the "
            "rate.",
            layers=layer_numbers(stuck),
            figure=max(stuck.values()),
        )


def _router_names(model: nn.Module, trains: dict[str, nn.Parameter]) -> list[str]:
    blocks = {f"{name}." for name in find_moe_blocks(model)}
    of_routers = {id(p) for router in find_routers(model).values() for p in router.parameters()}
    return [n for n, p in trains.items() if id(p) in of_routers and any(n.startswith(b) for b in blocks)]


def _look_at_gradients(report: Report, step: DryStep, trains: dict[str, nn.Parameter]) -> None:
    # The first half of an adapter has no gradient before the second one has moved.
    first_half = ("lora_A", "_A", "lora_magnitude_vector")
    none = [n for n, norm in step.gradients.items() if norm is None]
    zero = [
        n for n, norm in step.gradients.items() if norm == 0 and not any(h in n for h in first_half) and n not in none
    ]
    if none or zero:
        report.add(
            WARNING,
            "no-gradient",
            f"{listed([*none, *zero])} require gradients and got none in a step: they are not part of what computes the loss, or something "
            "detaches them.",
            layers=layer_numbers([*none, *zero]),
            figure=len(none) + len(zero),
        )
    not_finite = [
        n for n, norm in step.gradients.items() if norm is not None and not torch.isfinite(torch.tensor(norm))
    ]
    if not_finite:
        report.add_by_name(
            ERROR,
            "not-finite",
            not_finite,
            f"The gradient of {listed(not_finite)} is NaN or infinite in the first step.",
        )
    idle: dict[int, list[int]] = {}
    for name, norms in step.expert_gradients.items():
        layer = layer_numbers([name])
        experts = torch.where(norms == 0)[0].tolist()
        if layer and experts and len(experts) < len(norms) and not any(h in name for h in first_half):
            idle[layer[0]] = sorted({*idle.get(layer[0], []), *experts})
    if idle:
        report.add_by_layer(
            NOTE, "no-gradient", idle, "These experts got no token of the first batch, and so no gradient."
        )


def _look_at_routers(report: Report, trainer: Trainer, model: nn.Module, step: DryStep) -> None:
    coefficients = _coefficients(trainer, model)
    for name, value in coefficients.items():
        seen = step.router_losses.get(name)
        text = "" if seen is None else f", and is {seen:.4g} in the first batch"
        report.add(NOTE, "router-losses", f"{name} has an effective coefficient of {value:.4g}{text}.", figure=value)
    if not step.with_router_losses or not step.without_router_losses:
        return
    asked = {name: value for name, value in coefficients.items() if value}
    reached = any(
        not torch.equal(step.with_router_losses[name], step.without_router_losses[name])
        for name in step.with_router_losses.keys() & step.without_router_losses.keys()
    )
    if asked and not reached:
        report.add(
            WARNING,
            "balance-loss-silent",
            f"{', '.join(asked)} has a coefficient, and the routers' gradient is the same without it: it is not computed. Train with "
            "MoETrainer or moe_hf.add_router_losses, or set output_router_logits in the configuration.",
            layers=layer_numbers(step.with_router_losses),
            figure=max(asked.values()),
        )
    of_experts = [norm for name, norm in step.gradients.items() if ".experts." in name and norm]
    usual = max([*of_experts, *(norm for norm in step.gradients.values() if norm)], default=0.0)
    blind = [name for name, grad in step.without_router_losses.items() if float(grad.norm()) <= REACHED * usual]
    config = transformer_of(model).config.get_text_config()
    is_one = first_of(config, EXPERTS_PER_TOKEN_NAMES) == 1
    if blind and usual and not is_one and _are_copies(model):
        report.add_by_name(
            NOTE,
            "router-untrainable",
            blind,
            "The experts are still copies of each other, so the loss of the language model says nothing to the routers yet: it does once "
            "the experts differ.",
        )
    elif blind and usual:
        report.add_by_name(
            WARNING,
            "router-untrainable",
            blind,
            f"The loss of the language model does not reach {listed(blind)}: something detaches it, or with one expert per token whose weight is divided by itself the "
            "weight is always 1. Set norm_topk_prob to false, or use 2 experts per token.",
        )


def _are_copies(model: nn.Module) -> bool:
    """Whether experts are copies or parts of one MLP: by what an upcycling recorded, or since some are equal."""
    if getattr(transformer_of(model).config.get_text_config(), "upcycling", None):
        return True
    stacked = [p for block in find_moe_blocks(model).values() for p in block.experts.parameters() if p.ndim == 3]
    return any(len(p) > 1 and torch.equal(p[0], p[1]) for p in stacked)


def _coefficients(trainer: Trainer, model: nn.Module) -> dict[str, float]:
    own = getattr(trainer, "router_losses", None)
    if own is not None:
        return own.coefficients
    if not find_moe_blocks(model):
        return {}
    config = transformer_of(model).config.get_text_config()
    value = getattr(config, "router_aux_loss_coef", None)
    if not isinstance(value, int | float) or not value:
        return {}
    # The cross entropy is divided by the labels of the whole step, the auxiliary loss is not.
    times = trainer.args.gradient_accumulation_steps * trainer.args.world_size
    return {"router_aux_loss": value * (times if trainer.model_accepts_loss_kwargs else 1)}


def _count(batch: dict[str, Any]) -> int:
    tokens = batch.get("input_ids")
    return int(tokens.numel()) if isinstance(tokens, torch.Tensor) else 0


def _look_at_labels(report: Report, step: DryStep) -> None:
    labels = step.batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.ndim < 2 or labels.is_floating_point():
        return
    kept = (labels[..., 1:] != IGNORED).flatten(1).sum(1)
    if not kept.any():
        report.add(
            ERROR,
            "labels-ignored",
            f"All {labels.numel()} labels of the first batch are {IGNORED}: there is nothing to learn from. Look at the chat template, at "
            "where answers begin, and at max_length.",
            figure=0,
        )
    elif (kept == 0).any():
        report.add(
            WARNING,
            "labels-ignored",
            f"{int((kept == 0).sum())} of {len(kept)} rows of the first batch have no label to learn from.",
            figure=int((kept == 0).sum()),
        )


def _look_at_documents(report: Report, trainer: Trainer, model: nn.Module, step: DryStep) -> None:
    positions = step.batch.get("position_ids")
    packed = isinstance(positions, torch.Tensor) and positions.ndim == 2 and bool((positions[:, 1:] == 0).any())
    if not packed:
        if getattr(trainer.args, "packing", False):
            report.add(
                WARNING,
                "documents-leak",
                "Rows are packed, and the batch has no position_ids that begin anew: the documents of a row see each other. Set "
                "padding_free, or pack with moe_hf.data.",
            )
        return
    try:
        check_packing(transformer_of(model))
    except MoEError as error:
        report.add(WARNING, "documents-leak", str(error))
