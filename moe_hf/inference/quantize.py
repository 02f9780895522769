"""Experts as codes and scales, of which only the experts of a pass become numbers again, one at a time.

torchao and bitsandbytes quantize `nn.Linear` and leave the 3-D tensors of experts as they are, without a word. Letters: E
experts, O outputs, I inputs of a map.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from moe_hf.errors import MoEError
from moe_hf.finetuning import find_moe_blocks
from moe_hf.inference.footprint import LogitError, ModelBytes, logit_error, logits_of, model_bytes
from moe_hf.inference.schemes import Parts, QuantizationScheme
from moe_hf.kernels import (
    MatrixSource,
    StoredExperts,
    describe_experts,
    is_replaced,
    leave_to_each_process,
    refuse_stored,
    restore,
    run_in_place_of,
    stored_experts_forward,
    stored_maps,
    stored_names,
)
from moe_hf.unwrapping import unwrapped


class QuantizedMatrices(MatrixSource):
    """All experts of a map in codes: `parts` are those of [`QuantizationScheme`], stacked over experts."""

    def __init__(
        self, scheme: QuantizationScheme, parts: Parts, shape: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        self.scheme, self.parts, self.shape, self.dtype = scheme, parts, shape, dtype
        self.device = parts["codes"].device

    def matrix(self, expert: int) -> torch.Tensor:
        parts = {name: part[expert] for name, part in self.parts.items()}
        return self.scheme.decode(parts, self.shape[1:], self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> "QuantizedMatrices":
        parts = {name: part.to(device) for name, part in self.parts.items()}
        return QuantizedMatrices(self.scheme, parts, self.shape, dtype)

    def nbytes(self) -> dict[str, int]:
        return {self.device.type: sum(part.nbytes for part in self.parts.values())}


@dataclass(frozen=True)
class LowMemoryReport:
    """What `quantize_experts` did: bytes before and after, and the logits' error on the tokens that were given."""

    before: ModelBytes
    after: ModelBytes
    error: LogitError | None

    def __str__(self) -> str:
        experts = [sum(b.experts.values()) for b in (self.before, self.after)]
        rest = sum(self.after.rest.values())
        text = f"experts {experts[0]:,} -> {experts[1]:,} bytes ({experts[0] / experts[1]:.2f}x), the rest {rest:,}"
        if self.error is not None:
            text += (
                f"; logits differ by {self.error.relative:.2e} (relative), KL {self.error.divergence:.2e} nats/token, "
                f"same most likely token {self.error.same_choice:.1%}"
            )
        return text


@torch.no_grad()
def quantize_experts(
    model: nn.Module,
    scheme: str | QuantizationScheme,
    *,
    block_size: int | None = None,
    double_quant: bool = False,
    tokens: torch.Tensor | None = None,
) -> LowMemoryReport:
    """Quantize the routed experts of `model`, ours or a native MoE of transformers, in place; all else stays as it is.

    The codes are decoded where they are used: one matrix at a time, of the experts that a pass chose. Quantized experts are
    frozen; adapters train over them (`add_expert_lora`, afterwards), under DDP too, where each process has its own copy of the
    codes. `torch.compile` runs what is around the experts, and breaks its graph at them. Biases of experts are not quantized.

    Args:
        scheme (`str` or `QuantizationScheme`): `"int8"` (a scale per output row), or `"nf4"` (blocks of 64).
        block_size (`int`, *optional*): values per scale, in the order of the rows.
        double_quant (`bool`): the scales in 8 bits too.
        tokens (`torch.Tensor`, *optional*): ids `(B, S)` on which the logits before and after are compared.

    Returns:
        bytes before and after, and the error of the logits.

    Raises:
        MoEError: no experts behind transformers' experts interface, with adapters, sharded, quantized already, or with numbers
            that are not finite; the model is then unchanged.
    """
    if isinstance(scheme, str):
        scheme = QuantizationScheme(scheme, block_size, double_quant)
    model = unwrapped(model, changes_parameters=True)
    blocks = expert_modules(model)
    for name, experts in blocks.items():
        refuse_stored(name, experts)
        for parameter in _maps(experts).values():
            if not all(torch.isfinite(matrix.float().abs().amax()) for matrix in parameter.unbind(0)):
                raise MoEError(
                    f"The experts of {name} have a number that is infinite or NaN. Mend the checkpoint first."
                )
    before = model_bytes(model)
    expected = None if tokens is None else logits_of(model, tokens)
    for experts in blocks.values():
        swapped = describe_experts(experts).transposed
        for name, parameter in _maps(experts).items():
            set_stored(experts, name, StoredExperts(_quantized(parameter, scheme, swapped), swapped))
    leave_to_each_process(model)
    error = None if tokens is None else logit_error(expected, logits_of(model, tokens))
    return LowMemoryReport(before, model_bytes(model), error)


def _quantized(parameter: torch.Tensor, scheme: QuantizationScheme, swapped: bool) -> QuantizedMatrices:
    weight = parameter.detach().transpose(1, 2) if swapped else parameter.detach()
    encoded = [scheme.encode(matrix) for matrix in weight.unbind(0)]
    parts = {name: torch.stack([each[name] for each in encoded]) for name in encoded[0]}
    return QuantizedMatrices(scheme, parts, tuple(weight.shape), weight.dtype)


@torch.no_grad()
def restore_experts(model: nn.Module) -> nn.Module:
    """Make quantized or offloaded experts plain parameters again, with the values that were computed with; in place.

    What quantization rounded away does not come back. The parameters are frozen, on the device that computes.

    Returns:
        the same model.

    Raises:
        MoEError: the experts have adapters; remove these first.
    """
    given, model = model, unwrapped(model, changes_parameters=True)
    were_stored = stored_names(model)
    for experts in expert_modules(model).values():
        for name, stored in stored_maps(experts).items():
            whole = torch.stack([stored[expert].clone() for expert in range(len(stored))])
            experts.register_parameter(name, nn.Parameter(whole.contiguous(), requires_grad=False))
        if is_replaced(experts):
            restore(experts)
    leave_to_each_process(model, restored=were_stored)
    return given


def set_stored(experts: nn.Module, name: str, stored: StoredExperts) -> None:
    """Put `stored` in the place of the weight `name` of an experts module, and let the module run expert by expert."""
    experts.register_parameter(name, nn.Parameter(stored, requires_grad=False))
    if not is_replaced(experts):
        run_in_place_of(experts, stored_experts_forward)


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The experts modules of `model` by the name of their block, each of a kind that can be stored.

    Raises:
        MoEError: there are none, or one has adapters, is sharded, or is not behind transformers' experts interface.
    """
    blocks = {name: block.experts for name, block in find_moe_blocks(model).items()}
    if not blocks:
        raise MoEError(f"{type(model).__name__} has no MoE block. Upcycle a dense model first.")
    for name, experts in blocks.items():
        describe_experts(experts)
        if not hasattr(type(experts).forward, "__wrapped__"):
            raise MoEError(
                f"The experts of {name} ({type(experts).__name__}) mix the weights of all: keep them plain."
            )
        if vars(experts).get("_experts_function", stored_experts_forward) is not stored_experts_forward:
            raise MoEError(
                f"The experts of {name} have adapters or parameters of their own. Merge or remove these first "
                "(merge_expert_lora, remove_expert_lora, merge_selected_experts); adapters may be added afterwards."
            )
        if any(isinstance(parameter, DTensor) or parameter.is_meta for parameter in experts.parameters()):
            raise MoEError(f"The experts of {name} are sharded, or have no numbers: load the whole model first.")
    return blocks


def _maps(experts: nn.Module) -> dict[str, nn.Parameter]:
    description = describe_experts(experts)
    return {name: getattr(experts, name) for name in (description.first, description.second)}
