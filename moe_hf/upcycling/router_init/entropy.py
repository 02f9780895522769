"""How sharp a router starts: the entropy of its scores, and rows as long as gives the one asked for.

Letters: T tokens, D model width, E experts, G distinct rows.
"""

import math

import torch
from torch.nn import functional

from moe_hf.errors import MoEError
from moe_hf.modeling.routing import wide


# Scores that a mean entropy is taken over. The more experts, the less the entropy differs between tokens.
ENTROPY_SCORES, LEAST_TOKENS = 1 << 17, 1 << 10


def mean_entropy(router_logits: torch.Tensor, scoring_func: str = "softmax") -> float:
    """Mean over tokens of the entropy of their scores, in parts of ln E: 1 when all experts score alike.

    Args:
        router_logits (`torch.Tensor`): raw logits, (T, E), E > 1; computed in float32 or wider.
        scoring_func (`str`): scores that do not sum to 1, as sigmoids, are divided by their sum.
    """
    # Of logarithms, which do not underflow: sigmoids may all be zero.
    logits = wide(router_logits)
    log_scores = (logits if scoring_func == "softmax" else functional.logsigmoid(logits)).log_softmax(-1)
    return float(-(log_scores.exp() * log_scores).sum(-1).mean()) / math.log(router_logits.shape[-1])


def num_tokens(groups: int) -> int:
    """T, the tokens that the mean entropy of G rows is taken over."""
    return max(LEAST_TOKENS, ENTROPY_SCORES // groups)


def some_tokens(states: torch.Tensor, groups: int) -> torch.Tensor:
    """At most `num_tokens` of the tokens (T, D), from all places of the text, in float64 on the CPU."""
    return states[:: -(-len(states) // num_tokens(groups))].cpu().double()


def scaled_to_entropy(rows: torch.Tensor, logits: torch.Tensor, target: float, scoring_func: str) -> torch.Tensor:
    """`rows` times the factor that gives their scores the mean entropy `target`, which falls as the factor grows.

    Args:
        rows (`torch.Tensor`): (G, D) float32; a single row is returned as it is.
        logits (`torch.Tensor`): their products with some tokens, (T, G) float64.
        target (`float`): in parts of ln G, above 0 and below 1.
        scoring_func (`str`): as in `mean_entropy`.

    Raises:
        MoEError: when no factor gives that entropy.
    """
    if len(rows) == 1:
        return rows
    spread = float(logits.std(-1).mean())
    if not (math.isfinite(spread) and spread > 0):
        raise MoEError("The router's rows give all experts the same logits, or none that is finite: no scale helps.")
    low, high = 0.0, 1 / spread
    while mean_entropy(high * logits, scoring_func) > target:
        low, high = high, 2 * high
        if high * spread > 1e6:
            raise MoEError(
                f"With scoring_func={scoring_func!r} no scale of the router gives an entropy of {target}; the least is "
                f"{mean_entropy(high * logits, scoring_func):.3f}. Ask for more."
            )
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_entropy(middle * logits, scoring_func) > target else (low, middle)
    # Six digits, in which sums in another order agree.
    return rows * float(f"{high:.6g}")
