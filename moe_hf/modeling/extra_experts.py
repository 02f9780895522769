"""Experts of other kinds than MLPs, which the router may choose beside the E routed ones; `register_expert` for one's own.

Letters: T tokens, D model width, E routed experts, X extra experts.
"""

from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_moe import MoEConfig, MoEError


class ExtraExpert(nn.Module):
    """Base of the kinds: called on every token, it must cost little, or need the whole sequence.

    Attributes:
        cacheable: whether a token's output depends on that token alone. Otherwise decoding with a cache, which shows it
            the new tokens only, is refused. It must never depend on later tokens.
    """

    cacheable: ClassVar[bool] = True

    def __init__(self, config: MoEConfig, hidden_size: int):
        super().__init__()

    def reset_parameters(self) -> None:
        """Initialise the parameters that this module itself holds, with `transformers.initialization`."""

    def forward(self, tokens: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D), or what broadcasts to it.

        Args:
            tokens (`torch.Tensor`): all tokens of the forward pass, row by row, (T, D).
            sequence_ids (`torch.Tensor`): (T,), equal for tokens of one sequence (of one document, when packed), and -1
                for padding.
        """
        raise NotImplementedError


class ZeroExpert(ExtraExpert):
    """E(x) = 0: a choice that adds nothing.

    Source: MoE++, zero experts (https://huggingface.co/papers/2410.07348).
    """

    def forward(self, tokens: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
        return tokens.new_zeros(1)


class CopyExpert(ExtraExpert):
    """E(x) = x.

    Source: MoE++, copy experts (https://huggingface.co/papers/2410.07348).
    """

    def forward(self, tokens: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
        return tokens


class ConstantExpert(ExtraExpert):
    """E(x) = a x + b v with (a, b) = softmax(W x): `mix_weight` W (2, D) and `value` v (D,).

    Source: MoE++, constant experts (https://huggingface.co/papers/2410.07348), and its code, where v starts as N(0, 1).
    """

    def __init__(self, config: MoEConfig, hidden_size: int):
        super().__init__(config, hidden_size)
        self.mix_weight = nn.Parameter(torch.empty(2, hidden_size))
        self.value = nn.Parameter(torch.empty(hidden_size))

    def reset_parameters(self) -> None:
        init.normal_(self.value)
        init.kaiming_uniform_(self.mix_weight, a=5**0.5)

    def forward(self, tokens: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
        mix = F.linear(tokens, self.mix_weight).softmax(-1)  # (T, 2)
        return mix[:, :1] * tokens + mix[:, 1:] * self.value


EXTRA_EXPERTS: dict[str, type[ExtraExpert]] = {"zero": ZeroExpert, "copy": CopyExpert, "constant": ConstantExpert}
BUILT_IN_EXPERTS = frozenset(EXTRA_EXPERTS)


def register_expert(name: str, module: type[ExtraExpert]) -> None:
    """Add a kind of expert under `name`, for `MoEConfig(extra_experts=[name, ...])`.

    A module in a file of its own that calls this when it is imported travels with the models that are saved. Beside a
    saved model the file finds this function as `.extra_experts.register_expert`, elsewhere as `moe_hf.register_expert`.

    Args:
        name (`str`): a name that is not taken.
        module (`type[ExtraExpert]`): made as `module(config, hidden_size)`.

    Raises:
        MoEError: `name` is taken, or `module` is no `ExtraExpert`.
    """
    if name in EXTRA_EXPERTS:
        raise MoEError(f"An expert named {name!r} is already registered; choose another name.")
    if not (isinstance(module, type) and issubclass(module, ExtraExpert)):
        raise MoEError(f"register_expert needs a subclass of ExtraExpert, and got {module!r}.")
    EXTRA_EXPERTS[name] = module


def extra_expert(name: str) -> type[ExtraExpert]:
    """The kind of expert that `name` stands for.

    Raises:
        MoEError: for an unknown name.
    """
    if name not in EXTRA_EXPERTS:
        raise MoEError(
            f"extra_experts has {name!r}; it must be one of {sorted(EXTRA_EXPERTS)}. Import the file that registers an "
            "expert of your own first; one that was saved with a model needs trust_remote_code=True."
        )
    return EXTRA_EXPERTS[name]


class ExtraExperts(nn.ModuleList):
    """The X extra experts of one layer; the router's ids E to E + X - 1 stand for them."""

    def __init__(self, config: MoEConfig, hidden_size: int):
        super().__init__(extra_expert(name)(config, hidden_size) for name in config.extra_experts)

    def forward(self, tokens: torch.Tensor, weights: torch.Tensor, sequence_ids: torch.Tensor) -> torch.Tensor:
        """Their weighted sum, (T, D), from the tokens (T, D) and the weight of each expert for each token, (T, X)."""
        output = torch.zeros_like(tokens)
        for expert, weight in zip(self, weights.unbind(1), strict=True):
            output = output + (expert(tokens, sequence_ids) * weight[:, None]).to(output.dtype)
        return output
