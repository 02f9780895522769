"""What describes a native MoE family: names on the disk, routing, shared expert, dense layers, and dense twins.

Each part is small and says one thing, in both directions: to the native family and back.

Letters: F expert width, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from transformers import PreTrainedConfig

from moe_hf.modeling.configuration_moe import MoEConfig


@dataclass(frozen=True)
class Names:
    """Where a decoder layer of the family keeps a block, as names within the layer.

    Attributes:
        router: the (E, D) weight of the router.
        experts: gate, up and down projection. With `{e}` each expert has tensors of its own; without, the experts'
            tensors are one, and one name for gate and up says that each expert has the two in one.
        shared: gate, up and down projection of the shared expert, if the family can have one.
        shared_gate: the (1, D) weight of the shared expert's gate, if it has one.
        correction_bias: a bias that is added to the scores for choosing only; zero for a model
            without one.
    """

    router: str
    experts: tuple[str, str, str]
    shared: tuple[str, str, str] | None = None
    shared_gate: str | None = None
    correction_bias: str | None = None


@dataclass(frozen=True)
class SharedExpert:
    """The shared expert that a family can have; its width is `field` times `unit`.

    Attributes:
        field: of the native config; None when the width is always one unit.
        unit: `"1"`, or `"F"` when the width is counted in routed experts.
        gated: whether a sigmoid gate scales its output.
        least: the value of `field` when our model has no shared expert. 0 where the family can do without, else the
            width of one that is all zeros. 32 divides by the ranks of tensor parallelism and by quantised blocks.
    """

    field: str | None
    unit: str = "1"
    gated: bool = False
    least: int = 0


@dataclass(frozen=True)
class LayerChoice:
    """How a family says which layers stay dense.

    Attributes:
        says: what it can say, for messages.
        to_native: our config -> native fields, or None when they cannot say it.
        to_ours: native config -> fields of our config.
    """

    says: str
    to_native: Callable[[MoEConfig], dict[str, Any] | None]
    to_ours: Callable[[PreTrainedConfig], dict[str, Any]]


@dataclass(frozen=True)
class Check:
    """A requirement on a dense config that is more than one value: a function that returns a reason, or None.

    Attributes:
        fields: the dense fields that it answers for.
        reason: dense config -> why the native family cannot hold it, or None.
    """

    fields: tuple[str, ...]
    reason: Callable[[PreTrainedConfig], str | None]


@dataclass(frozen=True)
class Twin:
    """What a dense family must satisfy to be what a native family computes around its blocks.

    Fields that both configs have by one name are carried. A dense field that the native config lacks must be named here,
    or be of no effect on the outputs (`UNUSED`).

    Attributes:
        requires: dense fields, and the only value that the native family computes.
        checks: further requirements.
        sets: native fields that the dense config does not name: a value, or a function of the dense config.
        restores: dense fields that the native config does not name, for the way back: a function of the native config.
        splits: fused projections of the dense family, and the native projections that their rows are, in order.
        rotates_neighbours: whether it rotates dimensions 2i and 2i + 1 of a head together, where the native family
            rotates i and i + half of those that it rotates: the rows of the projections are put in that order.
        dense_width: dense config -> width of its MLPs.
    """

    requires: dict[str, Any] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    sets: dict[str, Any] = field(default_factory=dict)
    restores: dict[str, Callable[[PreTrainedConfig], Any]] = field(default_factory=dict)
    splits: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rotates_neighbours: bool = False
    dense_width: Callable[[PreTrainedConfig], int] = lambda dense: dense.intermediate_size


@dataclass(frozen=True)
class Family:
    """A MoE family of transformers.

    Attributes:
        decoder: what its attention and norms are, for messages.
        names: on the disk.
        twins: dense families by `model_type`; the first that fits is what an import takes.
        num_experts, num_experts_per_tok, width: the native fields of E, K and F.
        dense_width: the native field of the width of dense layers; None where the family has none.
        scoring: the scores that its router can take, and what its config says for each.
        scoring_field: the native field that says which.
        norm_topk_prob: the native field, or None where the weights of a token always sum to 1.
        routed_scaling_factor: the native field, or None where there is no such factor.
        shared: its shared expert, or None.
        layers: how it says which layers stay dense, or None where all have experts.
        constants: further native fields: a value, or a function of our config.
        servers_read: fields that its config class does not have, and other readers of the folder ask for.
        least_experts: E at which its router works.
        gguf_norm: what llama.cpp takes `norm_topk_prob` for, whatever the config says; None where it agrees.
        servers_divide: readers that take hidden_size / num_attention_heads for the size of a head, whatever the config says.
        note: how close a model comes that is not equal to the last digits, or None.
    """

    decoder: str
    names: Names
    twins: dict[str, Twin]
    num_experts: str = "num_experts"
    num_experts_per_tok: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    dense_width: str | None = "intermediate_size"
    scoring: dict[str, Any] = field(default_factory=lambda: {"softmax": None})
    scoring_field: str | None = None
    norm_topk_prob: str | None = "norm_topk_prob"
    routed_scaling_factor: str | None = None
    shared: SharedExpert | None = None
    layers: LayerChoice | None = None
    constants: dict[str, Any] = field(default_factory=dict)
    servers_read: dict[str, Any] = field(default_factory=dict)
    least_experts: int = 1
    gguf_norm: bool | None = None
    servers_divide: str | None = None
    note: str | None = None


# Dense fields that do not change what a trained model computes, or only say how another field was made.
UNUSED = {
    "attention_dropout",
    "block_auto_adjust_ff_dim",
    "block_ffn_dim_multiplier",
    "block_multiple_of",
    "embd_pdrop",
    "full_attn_idxs",
    "initializer_range",
    "no_rope_layer_interval",
    "pretraining_tp",
    "resid_pdrop",
    "residual_dropout",
    "use_cache",
}


def dense_layers(config: MoEConfig) -> list[int]:
    """The decoder layers without experts, from 0."""
    return [layer for layer in range(config.text_config.num_hidden_layers) if not config.is_moe_layer(layer)]


def first_layers(name: str) -> LayerChoice:
    """Dense layers are the first ones; the native field `name` counts them."""

    def to_native(config: MoEConfig) -> dict[str, Any] | None:
        layers = dense_layers(config)
        return {name: len(layers)} if layers == list(range(len(layers))) else None

    return LayerChoice(
        "only the first layers can be dense",
        to_native,
        lambda native: {"first_k_dense_replace": getattr(native, name)},
    )


LISTED_LAYERS = LayerChoice(
    "any",
    lambda config: {
        "decoder_sparse_step": config.decoder_sparse_step,
        "mlp_only_layers": sorted({*config.mlp_only_layers, *range(config.first_k_dense_replace)}),
    },
    lambda native: {
        "decoder_sparse_step": native.decoder_sparse_step,
        "mlp_only_layers": list(native.mlp_only_layers),
    },
)


def _interval_to_native(config: MoEConfig) -> dict[str, Any] | None:
    count = config.text_config.num_hidden_layers
    sparse = [layer for layer in range(count) if config.is_moe_layer(layer)]
    for interval, start, end in product(range(1, count + 1), (0, sparse[0]), (count - 1, sparse[-1])):
        if sparse == [layer for layer in range(start, end + 1) if (layer + 1) % interval == 0]:
            return {"moe_layer_start_index": start, "moe_layer_end_index": end, "moe_layer_interval": interval}
    return None


def _interval_to_ours(native: PreTrainedConfig) -> dict[str, Any]:
    start, end, interval = native.moe_layer_start_index, native.moe_layer_end_index, native.moe_layer_interval
    layers = range(native.num_hidden_layers)
    return {"mlp_only_layers": [i for i in layers if not start <= i <= end or (i + 1) % interval]}


LAYER_INTERVAL = LayerChoice(
    "experts can be in each n-th layer from a first to a last one", _interval_to_native, _interval_to_ours
)


def _layer_types(config: MoEConfig) -> dict[str, Any]:
    dense = dense_layers(config)
    count = config.text_config.num_hidden_layers
    return {
        "mlp_layer_types": ["dense" if layer in dense else "sparse" for layer in range(count)],
        # At 1 a dense layer would rotate queries and keys whatever its attention is.
        "prefix_dense_sliding_window_pattern": 2 if dense else 1,
    }


LAYER_TYPES = LayerChoice(
    "any",
    _layer_types,
    lambda native: {"mlp_only_layers": [i for i, kind in enumerate(native.mlp_layer_types) if kind == "dense"]},
)
