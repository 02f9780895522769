"""What one device holds and sends under each layout: DDP, FSDP2, and expert parallelism with FSDP2.

Letters: B batch, S sequence, T = B * S tokens of a micro-batch on a device, D model width, K experts per token,
E experts, N devices.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.finetuning import find_moe_blocks
from moe_hf.inspection import inspect_model
from moe_hf.training_plan.step_memory import StepMemory


LAYOUTS = ("DDP", "FSDP2", "EP+FSDP2")
# Of dispatch and combine, forward and backward; a checkpointed layer runs forward twice.
PASSES, RECOMPUTED_PASSES = 4, 2


@dataclass(frozen=True)
class ModelSizes:
    """Bytes of a model's parameters as they are trained, by what layouts do with them.

    Attributes:
        layers: of each decoder layer without its routed experts.
        layer_experts: of each decoder layer's routed experts.
        rest: of embeddings, the head and what else is outside of the layers.
        trained, trained_experts: of trained parameters in all, and of trained routed experts.
        expert: of one routed expert, the largest.
        num_experts, experts_per_token, num_moe_layers, hidden_size: E, K, MoE layers and D.
    """

    layers: tuple[int, ...]
    layer_experts: tuple[int, ...]
    rest: int
    trained: int
    trained_experts: int
    expert: int
    num_experts: int
    experts_per_token: int
    num_moe_layers: int
    hidden_size: int


@dataclass(frozen=True)
class LayoutPlan:
    """Bytes on one device, and bytes that it sends in one step.

    Attributes:
        layout: a name of `LAYOUTS`.
        weights, gradients, optimizer: what stays.
        activations: what else a step holds at its worst moment.
        buffers: gradient buckets, or gathered layers. Tokens that arrive take the place of rows that one device sorts by
            expert, which are among the activations.
        all_to_all: tokens sent to experts elsewhere and back.
        reduction: gradients and weights sent to be summed and gathered.
        why_not: why the layout cannot be used, or None.
    """

    layout: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int
    all_to_all: int
    reduction: int
    why_not: str | None = None

    @property
    def total(self) -> int:
        """Bytes that a device needs."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.buffers

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"total": self.total}


def model_sizes(model: PreTrainedModel, trained: Mapping[str, int]) -> ModelSizes:
    """Sort the parameters of a model, on any device.

    Args:
        model (`PreTrainedModel`): with experts.
        trained (`Mapping[str, int]`): names of trained parameters to the bytes of one value.

    Raises:
        MoEError: it has no MoE block, or no list of decoder layers.
    """
    blocks = find_moe_blocks(model)
    if not blocks:
        raise MoEError(f"{type(model).__name__} has no experts: give a MoE, or a dense model to upcycle.")
    config = model.config.get_text_config()
    lists = (
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    )
    prefix = next(lists, None)
    if prefix is None:
        raise MoEError(f"{type(model).__name__} has no list of {config.num_hidden_layers} decoder layers.")
    experts = tuple(f"{name}.experts." for name in blocks)
    layers, layer_experts, rest = [0] * config.num_hidden_layers, [0] * config.num_hidden_layers, 0
    of_trained = of_trained_experts = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() * trained.get(name, parameter.element_size())
        is_expert = name.startswith(experts)
        if name in trained:
            of_trained, of_trained_experts = of_trained + size, of_trained_experts + size * is_expert
        if name.startswith(prefix):
            index = int(name[len(prefix) :].split(".")[0])
            (layer_experts if is_expert else layers)[index] += size
        else:
            rest += size
    facts = inspect_model(model)
    return ModelSizes(
        layers=tuple(layers),
        layer_experts=tuple(layer_experts),
        rest=rest,
        trained=of_trained,
        trained_experts=of_trained_experts,
        expert=max(layer_experts) // facts.num_experts,
        num_experts=facts.num_experts,
        experts_per_token=facts.num_experts_per_tok,
        num_moe_layers=facts.num_moe_layers,
        hidden_size=config.hidden_size,
    )


def plan_layout(
    layout: str,
    memory: StepMemory,
    sizes: ModelSizes,
    *,
    gpus: int,
    tokens: int,
    value_bytes: int,
    checkpointing: bool,
    accumulation: int,
) -> LayoutPlan:
    """What one of `gpus` devices holds and sends.

    Compared with two processes on a CPU, over scopes, accumulation and checkpointing: within 15%
    (`tests/training_plan/test_layout_memory.py`).

    Args:
        layout (`str`): a name of `LAYOUTS`.
        memory (`StepMemory`): of one device that holds everything.
        sizes (`ModelSizes`): of the same model.
        tokens (`int`): T.
        value_bytes (`int`): of one value of an activation.
    """
    others = (gpus - 1) / gpus
    if layout == "DDP":
        # Buckets are copies of the gradients: gradient_as_bucket_view is off by default.
        return LayoutPlan(
            layout,
            memory.weights,
            memory.gradients,
            memory.optimizer,
            memory.peak - memory.weights - memory.gradients - memory.optimizer,
            memory.gradients if gpus > 1 else 0,
            0,
            round(2 * others * memory.gradients),
        )
    gradients, shared_peak = memory.gradients // gpus, memory.shared_peaks[gpus]
    apart = layout == "EP+FSDP2"
    gathered_layers = (
        sizes.layers if apart else [sum(pair) for pair in zip(sizes.layers, sizes.layer_experts, strict=True)]
    )
    gathered = sum(gathered_layers) + sizes.rest
    reduced = sizes.trained - (sizes.trained_experts if apart else 0)
    # The layer at work and the next one on its way. Gradients that are not divided yet are among the activations.
    buffers = round(others * sum(sorted([*gathered_layers, sizes.rest])[-2:]))
    if apart and checkpointing and sizes.trained_experts:
        # The worst moment is one layer's backward pass, whose experts have their gradients in parts.
        shared_peak -= round(others * max(sizes.layer_experts))
    rows = tokens * sizes.experts_per_token * sizes.hidden_size * value_bytes
    sent = PASSES + (RECOMPUTED_PASSES if checkpointing else 0)
    why_not = None
    if apart and sizes.num_experts % gpus:
        why_not = f"{sizes.num_experts} experts cannot be divided among {gpus} devices"
    return LayoutPlan(
        layout,
        memory.weights // gpus,
        gradients,
        memory.optimizer // gpus,
        max(0, shared_peak - gradients),
        buffers,
        round(sent * others * rows * sizes.num_moe_layers * accumulation) if apart else 0,
        round(others * accumulation * (2 * gathered + reduced)),
        why_not,
    )
