"""An expert of one's own kind: a causal convolution over the sequence, which the router may choose beside the MLPs.

Import this file, then `MoEConfig(text_config=..., extra_experts=["causal_convolution"])`. As it is a file of its own, it
travels with the models that are saved.
"""

import torch
from torch import nn
from transformers import initialization as init


try:
    from .extra_experts import ExtraExpert, register_expert
except ImportError:
    from moe_hf import register_expert
    from moe_hf.modeling.extra_experts import ExtraExpert

KERNEL_SIZE = 4


class CausalConvolution(ExtraExpert):
    """y_t = sum_j w_j * x_(t - j) for each channel by itself, over the last `KERNEL_SIZE` tokens of the sequence.

    It reads all tokens, also those that did not choose it: a convolution over chosen tokens alone would take neighbours
    in the batch for neighbours in the text.
    """

    cacheable = False  # the cache has no earlier tokens

    def __init__(self, config, hidden_size: int):
        super().__init__(config, hidden_size)
        self.weight = nn.Parameter(torch.empty(KERNEL_SIZE, hidden_size))

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=KERNEL_SIZE**-0.5)

    def forward(self, tokens: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
        output = tokens * self.weight[0]
        for offset in range(1, min(KERNEL_SIZE, len(tokens))):
            same_sequence = (sequence_ids[offset:] == sequence_ids[:-offset])[:, None]
            earlier = torch.where(same_sequence, tokens[:-offset], 0) * self.weight[offset]
            output = output + nn.functional.pad(earlier, (0, 0, offset, 0))
        return output


register_expert("causal_convolution", CausalConvolution)
