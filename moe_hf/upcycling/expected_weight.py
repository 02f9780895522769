"""How much a token's experts weigh together at the start, where the router decides it: what their outputs are divided by.

Weights that are not normalised (K = 1 as in Switch, sigmoid scores, `top_p`, ...) sum to something else for each token. A MoE
of copies would start at that sum times the dense output; divided by its mean, it starts around the dense output.

Letters: B batch, S sequence, T = B * S tokens, D model width.
"""

from collections.abc import Mapping

import torch
from torch.func import functional_call
from transformers import PreTrainedConfig

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.modeling.dense_mlp import MLPSite
from moe_hf.modeling.router import Router
from moe_hf.modeling.routing_ids import open_experts, spread_ids
from moe_hf.modeling.routing_pass import RoutingPass, routing_pass
from moe_hf.upcycling.recipes import random_generator
from moe_hf.upcycling.sample_text import SampleText


# Of the tokens that the mean is taken over, which leaves it an error of about a hundredth.
NUM_SEQUENCES, SEQUENCE_LENGTH = 8, 64
# Sums that differ by less, in parts of the largest, are equal: it is what float64 leaves of them.
EQUAL = 1e-9


def tokens_to_weigh(
    config: PreTrainedConfig, inputs: torch.Tensor | None, text: SampleText | None, seed: int
) -> torch.Tensor:
    """Token ids (B, S) to run the dense model on: the first of the user's, or else text, or else seeded random ones."""
    if inputs is not None:
        return inputs[:NUM_SEQUENCES, :SEQUENCE_LENGTH]
    if text is not None:
        return text.input_ids
    length = min(SEQUENCE_LENGTH, getattr(config, "max_position_embeddings", None) or SEQUENCE_LENGTH)
    generator = random_generator(seed, "tokens to weigh")
    return torch.randint(0, config.vocab_size, (NUM_SEQUENCES, length), generator=generator)


def gaussian_states(width: int, seed: int) -> torch.Tensor:
    """Stand-ins for what a router sees, (2, 16, D) float32, to tell sums that are constant from those that are not."""
    return torch.randn(2, 16, width, generator=random_generator(seed, "states to weigh"))


@torch.no_grad()
def expected_weight(router: Router, tensors: Mapping[str, torch.Tensor], states: torch.Tensor) -> tuple[float, bool]:
    """The mean over tokens of the sum of a token's weights, and whether it is that of each token.

    Args:
        router (`Router`): of the layer, in evaluation mode; it may be on the meta device, as its numbers are not read.
        tensors (`Mapping[str, torch.Tensor]`): all that it starts with, by name.
        states (`torch.Tensor`): what it sees, (B, S, D).

    Returns:
        The mean, rounded to digits in which sums in another order agree, and `True` where all sums are equal.

    Raises:
        MoEError: no token has an expert.
    """
    batch, length, width = states.shape
    ids = spread_ids(router.config, {}, (batch, length), None, None, torch.device("cpu"))
    given = RoutingPass(batch, length, ids=ids, open_experts=open_experts(router.config, ids))
    with routing_pass(given):
        inputs = states.cpu().double().view(-1, width)
        _, weights, _, *rows = functional_call(router, dict(tensors), (inputs,))
    sums = weights.double().sum(-1)
    if rows and rows[0] is not None:  # of rows of one expert each
        sums = torch.zeros(batch * length, dtype=torch.float64).index_add_(0, rows[0], sums)
    mean, spread = float(sums.mean()), float(sums.max() - sums.min())
    if mean <= 0:
        raise MoEError(
            f"No token of layer {router.layer_index} has an expert where its router starts "
            f"(router_type={router.config.router_type!r}): the experts cannot be scaled to the dense output. Use another "
            "router_init, or larger rows."
        )
    is_constant = spread <= EQUAL * float(sums.max())
    # Of normalised weights it is the factor, whatever digits that has.
    factor = router.config.routed_scaling_factor
    return (factor * float(f"{mean / factor:.12g}") if is_constant else float(f"{mean:.4g}")), is_constant


def router_of(config: MoEConfig, site: MLPSite) -> Router:
    """The router of the layer at `site`, without numbers."""
    with torch.device("meta"):
        return Router(config, site).eval()


def recorded_weight(config: MoEConfig, layer_index: int) -> float:
    """What the outputs of a layer's experts were divided by, as `config.upcycling` says: `routed_scaling_factor` if nothing."""
    weights = (config.upcycling or {}).get("expected_weight")
    return config.routed_scaling_factor if weights is None else weights[layer_index]
