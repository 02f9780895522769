"""Proof of an upcycling: dense and MoE model run on the same tokens, and the difference of their logits."""

import copy
from dataclasses import asdict, dataclass

import torch
from torch import nn

from moe_hf.modeling.configuration_moe import MoEError
from moe_hf.modeling.routing_ids import example_ids


EXACT_TOLERANCE = 1e-5
NUM_SEQUENCES, SEQUENCE_LENGTH = 2, 64


@dataclass(frozen=True)
class VerificationResult:
    """How far a MoE model's logits are from the dense model's.

    Attributes:
        relative_error: ||moe - dense|| / ||dense|| over all logits, computed in float32.
        max_abs_error: largest absolute difference of one logit.
        rounding_error: relative difference that the checkpoint's own dtype makes to the dense logits; 0 in float32.
        num_tokens: tokens compared.
        first_difference: name of the first decoder layer whose output differs by more than the tolerance, or None.
    """

    relative_error: float
    max_abs_error: float
    rounding_error: float
    num_tokens: int
    first_difference: str | None = None

    @property
    def exact(self) -> bool:
        """Whether the relative error is within 1e-5."""
        return self.relative_error <= EXACT_TOLERANCE

    def to_dict(self) -> dict[str, float | int | str | None]:
        """Plain values, for a checkpoint's metadata."""
        return asdict(self)


def verification_inputs(vocab_size: int, seed: int, max_length: int | None = None) -> torch.Tensor:
    """2 x 64 seeded random token ids, shorter if the model's positions are fewer."""
    length = min(SEQUENCE_LENGTH, max_length or SEQUENCE_LENGTH)
    return torch.randint(0, vocab_size, (NUM_SEQUENCES, length), generator=torch.Generator().manual_seed(seed))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; not finite values give infinity."""
    actual, expected = actual.double(), expected.double()
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


@torch.no_grad()
def _logits(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    was_training = model.training
    model.eval()
    try:
        ids = example_ids(model.config, len(inputs), model.device)
        return model(input_ids=inputs.to(model.device), use_cache=False, **ids).logits.cpu()
    finally:
        model.train(was_training)


def _layer_outputs(model: nn.Module, layers: list[str], inputs: torch.Tensor) -> list[torch.Tensor]:
    outputs: list[torch.Tensor] = []

    def keep(module, args, output):
        outputs.append((output[0] if isinstance(output, tuple) else output).detach().cpu())

    handles = [model.base_model.get_submodule(layer).register_forward_hook(keep) for layer in layers]
    try:
        _logits(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _first_difference(dense: nn.Module, moe: nn.Module, inputs: torch.Tensor) -> str | None:
    layers = [site.layer for site in moe.base_model._moe_sites]
    pairs = zip(_layer_outputs(dense, layers, inputs), _layer_outputs(moe, layers, inputs), strict=True)
    for layer, (expected, actual) in zip(layers, pairs, strict=True):
        if relative_error(actual, expected) > EXACT_TOLERANCE:
            return layer
    return None


def verify(
    dense: nn.Module, moe: nn.Module, inputs: torch.Tensor | None = None, *, seed: int = 0
) -> VerificationResult:
    """Compare the logits of a dense model and of the MoE made from it; neither is changed.

    Models in a 16-bit dtype are compared as float32 copies, so that the comparison shows the conversion and not
    their rounding, which is reported beside it.

    Args:
        dense, moe (`PreTrainedModel`): the two causal language models.
        inputs (`torch.Tensor`, *optional*): token ids, (B, S); compared besides 2 x 64 seeded random ids.
        seed (`int`): of the random ids.

    Returns:
        `VerificationResult`

    Raises:
        MoEError: when `inputs` are not token ids, or the vocabularies differ.
    """
    if dense.config.vocab_size != moe.config.vocab_size:
        raise MoEError(
            f"The dense model has {dense.config.vocab_size} tokens and the MoE model {moe.config.vocab_size}: "
            "they are not of one origin."
        )
    limit = getattr(moe.config, "max_position_embeddings", None)
    batches = [verification_inputs(moe.config.vocab_size, seed, limit)]
    if inputs is not None:
        if not isinstance(inputs, torch.Tensor) or inputs.dim() != 2 or inputs.is_floating_point():
            raise MoEError("verify inputs must be a (B, S) tensor of token ids.")
        batches.append(inputs)
    low = dense.dtype != torch.float32 or moe.dtype != torch.float32
    wide_dense = _float32_copy(dense) if dense.dtype != torch.float32 else dense
    wide_moe = _float32_copy(moe) if moe.dtype != torch.float32 else moe
    expected = [_logits(wide_dense, batch) for batch in batches]
    actual = [_logits(wide_moe, batch) for batch in batches]
    flat_expected = torch.cat([t.flatten() for t in expected])
    flat_actual = torch.cat([t.flatten() for t in actual])
    rounding = 0.0
    if low:
        rounding = relative_error(torch.cat([_logits(dense, b).flatten().float() for b in batches]), flat_expected)
    error = relative_error(flat_actual, flat_expected)
    return VerificationResult(
        relative_error=error,
        max_abs_error=float((flat_actual - flat_expected).abs().max()),
        rounding_error=rounding,
        num_tokens=sum(batch.numel() for batch in batches),
        first_difference=_first_difference(wide_dense, wide_moe, batches[0]) if error > EXACT_TOLERANCE else None,
    )


def _float32_copy(model: nn.Module) -> nn.Module:
    """A float32 copy made through the config, so that buffers such as rotary frequencies are computed, not cast."""
    config = copy.deepcopy(model.config)
    config.dtype = torch.float32
    wide = type(model)(config)
    wide.load_state_dict(model.state_dict())
    return wide.to(model.device, torch.float32)
