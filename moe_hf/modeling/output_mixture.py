"""Experts of the last layer that each predict, and a mixture of their distributions: the likelihood of Jacobs et al.

Elsewhere a layer mixes what its experts put out, and the model then predicts once. Here the last layer keeps its experts
apart: each finishes the forward pass alone, through the final norm and the head, and the gate weighs their predictions.

Letters: B batch, S sequence, T = B * S tokens, D model width, E experts, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.utils import ModelOutput
from transformers.utils.import_utils import is_torchdynamo_compiling

from .cache_names import cache_of, named_cache
from .config_checks import MoEError
from .routing import wide


# Logits that are held at once, E times those of the tokens of one piece: 64 MiB in float32.
PIECE = 2**24
NOT_HERE = (
    "output_mixture='likelihood' needs a decoder that ends with the last MoE layer, a norm and a head, and this one does more with its last hidden states: "
    "leave it out."
)


@dataclass
class OutputMixture:
    """The experts of the last layer in one forward pass.

    Attributes:
        log_weights: logarithm of the weight of each expert for each token, (T, E); set by the last layer's block.
        hidden_states: what the head reads, for each expert, (E, B, S, D); set by the decoder.
        outputs: the decoder's output.
    """

    log_weights: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    outputs: ModelOutput | None = None

    def take(self, outputs: ModelOutput, batch_size: int) -> ModelOutput:
        """Keep the decoder's result for each expert, and give the head little to do with it.

        Raises:
            MoEError: the decoder did not carry the experts apart to its end.
        """
        num_experts, hidden_states = self.log_weights.shape[-1], outputs.last_hidden_state
        shape = (num_experts, batch_size, -1, hidden_states.shape[-1])
        length = len(self.log_weights) // batch_size
        if hidden_states.shape[:-1].numel() != num_experts * batch_size * length:
            raise MoEError(NOT_HERE)
        self.hidden_states = hidden_states.reshape(shape)
        states = outputs.get("hidden_states")
        if states is not None:
            expected = states[0].shape
            outputs["hidden_states"] = tuple(
                state if state.shape == expected else self._mean(state.reshape(shape)) for state in states
            )
        self.outputs = outputs
        return self.ending_with(self.hidden_states[0, :, -1:], cache_of(outputs))

    def ending_with(self, hidden_states: torch.Tensor, cache: Cache | None = None) -> ModelOutput:
        """The decoder's output with other last hidden states, for a head to read."""
        changed = {"last_hidden_state": hidden_states} | dict.fromkeys(named_cache(self.outputs), cache)
        return type(self.outputs)(**{**self.outputs, **changed})

    def _mean(self, states: torch.Tensor) -> torch.Tensor:
        """The weighted mean over the experts, (E, B, S, D) -> (B, S, D)."""
        weights = self.log_weights.exp().T.view(*states.shape[:3], 1)
        return (weights * states).sum(0).to(states.dtype)

    def logits(
        self, head: Callable[[torch.Tensor], torch.Tensor], vocab_size: int, keep: int | torch.Tensor = 0
    ) -> torch.Tensor:
        """The mixture's logits, (B, S, V), in the dtype of the head's.

        Args:
            head (`Callable`): (E, n, D) -> logits (E, n, V).
            vocab_size (`int`): V.
            keep (`int` or `torch.Tensor`): the last so many positions, 0 for all; or which ones.
        """
        states = self.hidden_states  # (E, B, S, D)
        weights = self.log_weights.T.reshape(states.shape[:3])  # (E, B, S)
        if isinstance(keep, torch.Tensor) or keep:
            places = slice(-keep, None) if isinstance(keep, int) else keep
            states, weights = states[:, :, places], weights[:, :, places]
        shape = states.shape[1:3]
        states, weights = states.flatten(1, 2), weights.flatten(1, 2)

        def piece(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            logits = head(states)
            return mix_logits(wide(logits), weights).to(logits.dtype)

        tokens_at_once = max(1, PIECE // (vocab_size * len(states)))
        pieces = zip(states.split(tokens_at_once, 1), weights.split(tokens_at_once, 1), strict=True)
        if not torch.is_grad_enabled() or is_torchdynamo_compiling():
            return torch.cat([piece(*inputs) for inputs in pieces]).unflatten(0, shape)
        # The logits of single experts are computed again in the backward pass, not kept.
        return torch.cat([checkpoint(piece, *inputs, use_reentrant=False) for inputs in pieces]).unflatten(0, shape)


def mix_likelihoods(log_weights: torch.Tensor, log_likelihoods: torch.Tensor) -> torch.Tensor:
    """log sum_i p_i P_i from log p_i and log P_i over the first dimension, (E, ...) -> (...).

    With log P_i = -|d - o_i|^2 / 2 this is minus the third error function of the source. Its gradient for log P_i is the
    posterior p_i P_i / sum_j p_j P_j: an expert learns from the tokens that it predicts better than others.

    Source: Jacobs, Jordan, Nowlan and Hinton, Adaptive Mixtures of Local Experts, eq. 1.3 (Neural Computation 3(1), 1991,
    https://doi.org/10.1162/neco.1991.3.1.79).
    """
    return (log_weights + log_likelihoods).logsumexp(0)


def mix_logits(logits: torch.Tensor, log_weights: torch.Tensor) -> torch.Tensor:
    """Logits of the mixture of the experts' distributions, (E, n, V) and (E, n) -> (n, V).

    They are the logarithms of sum_i p_i softmax(l_i), plus the weighted mean of logsumexp(l_i), which no softmax sees:
    where all experts have the same logits these are the result.
    """
    norms = logits.logsumexp(-1, keepdim=True)  # (E, n, 1)
    log_weights = log_weights[..., None].to(logits.dtype)
    return mix_likelihoods(log_weights, logits - norms) + (log_weights.exp() * norms).sum(0)
