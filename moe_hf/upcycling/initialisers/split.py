"""An initialiser without copies: the dense MLP is cut into E experts that each have a part of its neurons.

Letters: F expert width, E experts, K experts per token, S width of the shared expert.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from moe_hf.errors import MoEError
from moe_hf.modeling.configuration_moe import MoEConfig
from moe_hf.upcycling.initialisers.base import DenseLayer, Initialiser, fill_up
from moe_hf.upcycling.initialisers.neuron_groups import DATA_DRIVEN, NEURON_GROUPS, importance
from moe_hf.upcycling.recipes import ExpertRecipe


@dataclass(frozen=True, kw_only=True)
class Split(Initialiser):
    """Each neuron of the dense MLP goes to one expert; a token uses K of the E parts, so that the function changes.

    With weights w_i that sum to 1, the output is scale * sum_i w_i FFN_i(x) over the K chosen parts, where the sum of all
    FFN_i is the dense MLP. scale = K adds the chosen parts as the dense MLP does, and scale = E makes the mean over random
    choices the dense output. The factor of least squares lies between: of parts with correlation r it is
    K (1 + (E - 1) r) / (1 + (K - 1) r). The default is the geometric mean of both, sqrt(K E), which is exact for K = E and
    equal weights, and started nearest to the dense model wherever it was measured. LLaMA-MoE's code has E / K.

    With a shared expert of width S (`shared_expert_intermediate_size`), the S neurons that matter most on the user's
    tokens go there, unscaled, and only the others are cut.

    Attributes:
        by: which neurons go together: `"random"`, `"contiguous"`, `"kmeans"` (of the rows of the gate projection),
            `"coactivation"` (active on the same tokens), or `"importance"` (matter on the same kind of token).
        scale: factor on the experts' output; sqrt(K E) if not given.
    """

    name: ClassVar[str] = "split"
    equation: ClassVar[str] = "E_i(x) = scale FFN_i(x), FFN = FFN_shared + sum_i FFN_i"
    paper: ClassVar[str] = (
        "LLaMA-MoE (https://huggingface.co/papers/2406.16554); shared neurons as in LLaMA-MoE v2 "
        "(https://huggingface.co/papers/2411.15708)"
    )

    by: str = "random"
    scale: float | None = None

    def __post_init__(self):
        if self.by not in NEURON_GROUPS:
            raise MoEError(f"by of init='split' is {self.by!r}; it must be one of {list(NEURON_GROUPS)}.")
        if self.scale is not None and not (math.isfinite(self.scale) and self.scale > 0):
            raise MoEError(f"scale of init='split' is {self.scale}; it must be finite and above 0.")

    @property
    def exact(self) -> bool:
        """Never, whatever the router chooses."""
        return False

    @property
    def makes_shared_expert(self) -> bool:
        """Of the most important neurons."""
        return True

    def cost_at_start(self, config: MoEConfig) -> str:
        """A token uses K of E parts."""
        return (
            f"init='split' lets a token use {config.num_experts_per_tok} of the {config.num_experts} parts of each MLP: LLaMA-MoE "
            "trained 200 B tokens after it. Use a larger num_experts_per_tok, a shared expert "
            "(shared_expert_intermediate_size), experts in fewer layers (decoder_sparse_step), or init='granular', which "
            "loses nothing."
        )

    def needs_inputs(self, config: MoEConfig) -> bool:
        """For the groups that follow activations, and to choose the neurons of a shared expert."""
        return self.by in DATA_DRIVEN or config.shared_expert_intermediate_size > 0

    def settled(self, config: MoEConfig) -> "Split":
        """With the scale written out."""
        return replace(self, scale=self.output_scale(config))

    def output_scale(self, config: MoEConfig) -> float:
        """`scale`, or the geometric mean of K and E."""
        return math.sqrt(config.num_experts_per_tok * config.num_experts) if self.scale is None else float(self.scale)

    def expert_width(self, dense_widths: tuple[int, ...], config: MoEConfig) -> int:
        """An E-th of the neurons that are not in the shared expert."""
        width, shared, experts = dense_widths[0], config.shared_expert_intermediate_size, config.num_experts
        if shared >= width:
            raise MoEError(
                f"shared_expert_intermediate_size is {shared}, and init='split' takes the shared expert's neurons from the "
                f"dense MLP, which has {width}: make it narrower."
            )
        if (width - shared) % experts:
            raise MoEError(
                f"init='split' cannot cut {width - shared} neurons (a dense MLP of {width}, less {shared} for a shared "
                f"expert) into num_experts={experts} equal parts: change num_experts, or let "
                f"shared_expert_intermediate_size be {width % experts} or that plus a multiple of {experts}."
            )
        return (width - shared) // experts

    def experts(self, layer: DenseLayer, config: MoEConfig) -> list[ExpertRecipe]:
        """E recipes, and one of the shared expert if there is one."""
        neurons, shared = torch.arange(layer.site.intermediate_size), []
        if config.shared_expert_intermediate_size:
            order = importance(layer)[0].argsort(descending=True, stable=True)
            width = config.shared_expert_intermediate_size
            chosen, neurons = order[:width].sort().values, order[width:].sort().values
            # The routed experts have the one bias of down_proj, with weights that sum to 1.
            shared = [ExpertRecipe(neurons=chosen, bias_scale=0.0)]
        labels = NEURON_GROUPS[self.by](layer, neurons, config.num_experts)
        groups = [neurons[labels == expert] for expert in range(config.num_experts)]
        return [ExpertRecipe(neurons=fill_up(group, layer.width)) for group in groups] + shared
