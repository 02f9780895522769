"""Multi-head MoE: each token is split into sub-tokens, which are routed one by one and merged again.

Letters: T tokens, D model width, F expert width, E experts, K experts per token or sub-token, h heads.
"""

import torch
from torch import nn

from .configuration_moe import MoEError


# Of the Xavier initialisation of the head projection.
HEAD_GAIN = 2**-0.5


class MultiHead(nn.Module):
    """The two projections around the experts: y = W_merge concat_i MoE(x_i) with x_1 ... x_h the parts of W_head x.

    The h sub-tokens of a token stand next to each other, (T * h, D / h). They are a token's own, so nothing here looks
    at other tokens.

    Source: MH-MoE, section 3 (https://huggingface.co/papers/2404.15045). With the experts of a plain MoE it costs more
    than that; `parity_width` and `parity_experts` give sizes of equal cost.
    """

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        if hidden_size % heads:
            raise MoEError(f"num_moe_heads is {heads}; it must divide the model's width, {hidden_size}.")
        self.heads = heads
        self.head_proj = nn.Linear(hidden_size, hidden_size)
        self.merge_proj = nn.Linear(hidden_size, hidden_size)

    def split(self, tokens: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T * h, D / h)."""
        return self.head_proj(tokens).reshape(-1, tokens.shape[-1] // self.heads)

    def merge(self, sub_tokens: torch.Tensor) -> torch.Tensor:
        """(T * h, D / h) -> (T, D)."""
        return self.merge_proj(sub_tokens.reshape(-1, self.merge_proj.in_features))

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def parity_width(
    hidden_size: int,
    width: int,
    experts_per_token: int = 1,
    *,
    multi_head_experts: int = 1,
    gated: bool = True,
    multiple_of: int = 8,
) -> int:
    """The expert width F at which a multi-head MoE does the arithmetic of a plain one, whatever its number of heads.

    Per token 2 D^2 + m D F' K' = m D F K multiplications, m = 3 matrices in a gated expert and 2 in a plain one.

    Args:
        hidden_size (`int`): D.
        width (`int`): F of the plain MoE.
        experts_per_token (`int`): K of the plain MoE.
        multi_head_experts (`int`): K' of the multi-head MoE, per sub-token.
        gated (`bool`): whether experts have a gate, as SwiGLU has.
        multiple_of (`int`): what F' is rounded down to a multiple of; `grouped_mm` wants rows of 16 bytes.

    Raises:
        MoEError: the two projections alone cost more than the plain MoE.

    Source: Huang et al. (https://huggingface.co/papers/2411.16205).
    """
    matrices = 3 if gated else 2
    result = (matrices * width * experts_per_token - 2 * hidden_size) // (matrices * multi_head_experts)
    result -= result % multiple_of
    if result < 1:
        raise MoEError(
            f"Experts of width {width} cost less than the two projections of a multi-head MoE of width {hidden_size}; "
            "use wider ones."
        )
    return result


def parity_experts(
    hidden_size: int, width: int, num_experts: int, heads: int, multi_head_width: int, *, gated: bool = True
) -> int:
    """The number of experts at which a multi-head MoE has at most the parameters of a plain one.

    2 D^2 + m (D / h) F' E' = m D F E, m = 3 matrices in a gated expert and 2 in a plain one. Routers do not count.

    Args:
        hidden_size (`int`): D.
        width, num_experts (`int`): F and E of the plain MoE.
        heads (`int`): h.
        multi_head_width (`int`): F' of the multi-head MoE, as `parity_width` gives it.
        gated (`bool`): whether experts have a gate.

    Source: Huang et al. (https://huggingface.co/papers/2411.16205).
    """
    matrices = 3 if gated else 2
    return (matrices * width * num_experts - 2 * hidden_size) * heads // (matrices * multi_head_width)
