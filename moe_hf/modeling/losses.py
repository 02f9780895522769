"""The losses of the router, each for one layer and unweighted, from raw logits in float32.

Letters: T tokens, E experts, K experts per token.
"""

import torch

from .routing import router_scores, wide


def load_balancing_loss(
    router_logits: torch.Tensor,
    top_k_index: torch.Tensor,
    token_mask: torch.Tensor | None = None,
    *,
    token_index: torch.Tensor | None = None,
    scoring_func: str = "softmax",
) -> torch.Tensor:
    """Penalise uneven use of the experts of one layer: E * sum_e f_e P_e.

    f_e is the share of the choices that went to expert e and P_e its mean score; only P carries a gradient.

    Args:
        router_logits (`torch.Tensor`): raw logits, (T, E), any float dtype.
        top_k_index (`torch.Tensor`): chosen experts, (T, K).
        token_mask (`torch.Tensor`, *optional*): (T,), 1 for real tokens; padding does not count.
        token_index (`torch.Tensor`, *optional*): the token of each row of `top_k_index`, (R,), when tokens have a
            varying number of experts.
        scoring_func (`str`): `"softmax"`, or `"sigmoid"` whose scores are divided by their sum per token.

    Returns:
        Scalar, dimensionless: 1 at perfect balance, E / K when K experts take all.

    Source: Switch Transformer, eq. 4-6 (https://huggingface.co/papers/2101.03961), with f divided by K; the scores of
    a sigmoid are normalised as in DeepSeek-V3, eq. 17-20 (https://huggingface.co/papers/2412.19437).
    """
    num_experts = router_logits.shape[-1]
    scores = router_scores(router_logits, scoring_func)  # (T, E)
    if scoring_func == "sigmoid":
        scores = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
    mask = scores.new_ones(scores.shape[0]) if token_mask is None else token_mask.to(scores.dtype)
    rows = mask if token_index is None else mask[token_index]
    weights = rows[:, None].expand(top_k_index.shape).reshape(-1)
    counts = scores.new_zeros(num_experts).scatter_add(0, top_k_index.reshape(-1), weights)
    choice_share = counts / counts.sum().clamp_min(1)  # (E,)
    mean_score = (scores * mask[:, None]).sum(0) / mask.sum().clamp_min(1)  # (E,)
    return num_experts * (choice_share * mean_score).sum()


def router_z_loss(router_logits: torch.Tensor, token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Keep the router's logits small: the mean over tokens of logsumexp(logits) squared.

    Args:
        router_logits (`torch.Tensor`): raw logits, (T, E), any float dtype.
        token_mask (`torch.Tensor`, *optional*): (T,), 1 for real tokens; padding does not count.

    Returns:
        Scalar, in squared logits (nats squared).

    Source: ST-MoE, eq. 5 (https://huggingface.co/papers/2202.08906).
    """
    squares = torch.logsumexp(wide(router_logits), dim=-1).square()  # (T,)
    if token_mask is None:
        return squares.mean()
    mask = token_mask.to(squares.dtype)
    return (squares * mask).sum() / mask.sum().clamp_min(1)
