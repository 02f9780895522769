"""What a model holds in bytes, and how far its logits moved."""

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from moe_hf.errors import MoEError
from moe_hf.finetuning import find_moe_blocks
from moe_hf.kernels import StoredExperts


@dataclass(frozen=True)
class ModelBytes:
    """Bytes that a model's tensors hold, by device type (`cpu`, `cuda`), and `disk` for what is left in a file.

    `experts` are the routed experts' parameters, `rest` everything else, buffers too. A cache of experts counts as experts.
    """

    experts: dict[str, int]
    rest: dict[str, int]

    @property
    def in_memory(self) -> int:
        """Bytes of all kinds of memory together, without the disk."""
        return sum(n for part in (self.experts, self.rest) for kind, n in part.items() if kind != "disk")


def model_bytes(model: nn.Module) -> ModelBytes:
    """Count the bytes of the parameters and buffers of `model`, each tensor once."""
    expert_modules = {id(module) for block in find_moe_blocks(model).values() for module in block.experts.modules()}
    experts, rest, seen = Counter(), Counter(), set()
    for module in model.modules():
        own = experts if id(module) in expert_modules else rest
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if isinstance(tensor, StoredExperts):
                own.update(tensor.source.nbytes())
            else:
                own[tensor.device.type] += tensor.nbytes
    return ModelBytes(dict(experts), dict(rest))


@dataclass(frozen=True)
class LogitError:
    """How far logits are from those of reference, over all tokens.

    `relative` is the norm of the difference over the norm of the reference, `largest` the largest difference, `divergence` the
    mean KL(reference || other) in nats/token, `same_choice` the share of tokens whose most likely next token is the same.
    """

    relative: float
    largest: float
    divergence: float
    same_choice: float


def logit_error(reference: torch.Tensor, other: torch.Tensor) -> LogitError:
    """Compare logits (..., V); the sums are in float64."""
    expected, actual = reference.double().flatten(0, -2), other.double().flatten(0, -2)
    logs, other_logs = F.log_softmax(expected, -1), F.log_softmax(actual, -1)
    return LogitError(
        relative=((actual - expected).norm() / expected.norm()).item(),
        largest=(actual - expected).abs().max().item(),
        divergence=F.kl_div(other_logs, logs, log_target=True, reduction="batchmean").item(),
        same_choice=(expected.argmax(-1) == actual.argmax(-1)).double().mean().item(),
    )


@torch.no_grad()
def logits_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of `tokens` (B, S) in eval mode, (B, S, V).

    Raises:
        MoEError: `tokens` are not (B, S) integers.
    """
    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise MoEError(f"tokens are {tuple(tokens.shape)} {tokens.dtype}; token ids (batch, sequence) are wanted.")
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=tokens.to(model.device), use_cache=False).logits
    finally:
        model.train(was_training)
