"""What the routers of a model answer: where they are, and which of their rows are of real tokens.

Letters: B batch, S sequence, T = B * S tokens, h sub-tokens of a token, E experts, K experts per row, R rows.
"""

from typing import Any

import torch
from torch import nn

from moe_hf.errors import MoEError


ROUTER_NAMES = ("gate", "router")


def find_routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model by the name of their block: the child `gate` or `router` beside a child `experts`."""
    routers = {}
    for name, module in model.named_modules():
        children = dict(module.named_children())
        if "experts" not in children:
            continue
        router = next((children[child] for child in ROUTER_NAMES if child in children), None)
        if router is not None:
            routers[name] = router
    return routers


def real_choices(router: nn.Module, output: Any, token_mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """What a router says of real tokens.

    Args:
        router (`nn.Module`): to be named in an error.
        output (`tuple`): what it returned: logits (T * h, E), weights, experts (R, K), and for routers with flat rows the
            token of each row, (R,), or None.
        token_mask (`torch.Tensor`, *optional*): (T,) bool, False for padding.

    Returns:
        logits (T' * h, E) and experts (R', K), without the rows of padding.

    Raises:
        MoEError: the router returns no choices.
    """
    if not isinstance(output, tuple) or len(output) < 3:
        raise MoEError(f"{type(router).__name__} returns no (logits, weights, index): its choices are not known.")
    logits, index = output[0], output[2]
    if token_mask is None:
        return logits, index
    # A router of sub-tokens has several rows per token.
    real = token_mask.to(logits.device).repeat_interleave(len(logits) // len(token_mask))
    token_index = output[3] if len(output) > 3 else None
    return logits[real], index[real if token_index is None else real[token_index]]
