"""MoE configurations by paper: the fields of `MoEConfig` that make a dense decoder into the MoE of a paper.

A preset sets what the paper is about and leaves the rest at its default. Some of the papers are about encoders,
translation or images: `in_a_decoder` says what is different here. What a source was not found for is not set.

Letters: D model width, F width of the dense MLP, E experts, K experts per token.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

from .config_checks import MoEError, nearest_name


@dataclass(frozen=True)
class Preset:
    """One paper's MoE.

    Attributes:
        source: where the values are from.
        in_a_decoder: how it differs from the source in a causal decoder.
        fields: fields of `MoEConfig`, by name.
        sized: further fields, from (decoder layers, D, F).
        not_read: the fields whose values were not found in the source itself: they come from other people's code or text about
            it, or are a choice of this package.
        sums_layers: whether the source adds up the losses of its layers, where `MoEConfig` takes their mean: the
            coefficients are then multiplied by the number of MoE layers.
    """

    source: str
    in_a_decoder: str
    fields: dict[str, Any] = field(default_factory=dict)
    sized: Callable[[int, int, int], dict[str, Any]] | None = None
    sums_layers: bool = False
    not_read: tuple[str, ...] = ()

    def describe(self) -> str:
        """The source, what differs, and which values are not the source's own words."""
        text = f"{self.source}. In a decoder: {self.in_a_decoder}."
        return text + (f" Not read in the source itself: {', '.join(self.not_read)}." if self.not_read else "")


MLP_WIDTHS = ["intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "d_ff"]
NO_LOSS = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
EVERY_OTHER = {"decoder_sparse_step": 2}
PAPER = "https://huggingface.co/papers/"


def _multiple_of_8(width: float) -> int:
    """The nearest width that grouped matrix products take in half precision, in rows of 16 bytes."""
    return max(round(width / 8), 1) * 8


def _deepseek_moe(layers: int, hidden_size: int, width: int) -> dict[str, Any]:
    # Experts of a quarter of an MLP, and two of them shared.
    quarter = _multiple_of_8(width / 4)
    return {"moe_intermediate_size": quarter, "shared_expert_intermediate_size": 2 * quarter}


def _deepseek_v3(layers: int, hidden_size: int, width: int) -> dict[str, Any]:
    # 2048 of 18432: the 8 + 1 experts of a token are as wide as the MLP of a dense layer.
    ninth = _multiple_of_8(width / 9)
    return {
        "moe_intermediate_size": ninth,
        "shared_expert_intermediate_size": ninth,
        "first_k_dense_replace": min(3, layers - 1),
    }


def _mh_moe(layers: int, hidden_size: int, width: int) -> dict[str, Any]:
    # As much arithmetic with K = 2 as a gated MoE with K = 1, projections included: 768 for D = 768 and F = 2048.
    return {"moe_intermediate_size": _multiple_of_8((3 * width - 2 * hidden_size) / 6)}


def _pr_moe(layers: int, hidden_size: int, width: int) -> dict[str, Any]:
    # "32/64": every other layer, and twice the experts in the last sixth of the MoE layers.
    sparse = range(1, layers, 2)
    later = set(sparse[len(sparse) - max(len(sparse) // 6, 1) :])
    experts = [(64 if i in later else 32) if i in sparse else 0 for i in range(layers)]
    return {"num_experts_per_layer": experts, "shared_expert_intermediate_size": width}


PRESETS: dict[str, Preset] = {
    "jacobs1991": Preset(
        "Jacobs, Jordan, Nowlan and Hinton, Adaptive Mixtures of Local Experts, Neural Computation 3(1), 1991",
        "the experts' outputs are mixed in every layer but the last, whose experts each predict; the paper's experts are whole "
        "networks",
        {
            "router_type": "dense",
            "output_mixture": "likelihood",
            "num_experts": 8,
            "num_experts_per_tok": 8,
            **NO_LOSS,
        },
        not_read=("num_experts",),
    ),
    "eigen2013": Preset(
        PAPER + "1312.4314",
        "weights are added up per optimizer step, not per example, so that no token sees the rest of its batch; the margin "
        "is not the paper's",
        {"router_type": "dense_margin", "num_experts": 8, "num_experts_per_tok": 8, **NO_LOSS},
        not_read=("num_experts",),
    ),
    "bengio2013": Preset(
        PAPER + "1308.3432",
        "gates open and close whole experts; `sparsity_loss`, with a coefficient that is not the paper's, holds K of E open",
        {
            "router_type": "bernoulli",
            "scoring_func": "sigmoid",
            "router_loss_coefs": {"sparsity_loss": 1.0},
            **NO_LOSS,
        },
    ),
    "bengio2015": Preset(
        PAPER + "1511.06297",
        "gates open and close whole experts, rewarded by their own token's prediction; the coefficients are not the paper's",
        {
            "router_type": "bernoulli",
            "scoring_func": "sigmoid",
            "router_kwargs": {"estimator": "reinforce"},
            "router_loss_coefs": {"policy_gradient_loss": 0.1, "sparsity_loss": 1.0, "gate_variance_loss": 0.1},
            **NO_LOSS,
        },
    ),
    "shazeer2017": Preset(
        PAPER + "1701.06538 and tensor2tensor's expert_utils.py",
        "experts replace the MLP of every layer; the paper has one MoE layer between two LSTMs",
        {
            "num_experts_per_tok": 4,
            "router_noise": "learned",
            "router_noise_affects": "both",
            "router_loss_coefs": {"importance_loss": 0.01, "load_loss": 0.01},
            **NO_LOSS,
        },
        not_read=("num_experts_per_tok",),
    ),
    "gshard": Preset(
        PAPER + "2006.16668",
        "slots go to earlier tokens first, by sequence, and evaluation is dropless; there: all first choices of a group "
        "before all second ones, in evaluation too. The balance loss counts both choices, there the first",
        {
            **EVERY_OTHER,
            "router_type": "stochastic_top_k",
            "router_kwargs": {"policy": "random", "threshold": 0.5},
            "capacity_factor": 1.0,
            "router_z_loss_coef": 0.0,
        },
        not_read=("decoder_sparse_step", "router_kwargs", "capacity_factor"),
    ),
    "switch": Preset(
        PAPER + "2101.03961; Mesh TensorFlow for the jitter",
        "an encoder and a decoder there; slots are per sequence, and evaluation is dropless",
        {
            **EVERY_OTHER,
            "num_experts": 128,
            "num_experts_per_tok": 1,
            "capacity_factor": 1.25,
            "router_jitter_noise": 0.01,
            "router_aux_loss_coef": 0.01,
            "router_z_loss_coef": 0.0,
        },
        sums_layers=True,
        not_read=("decoder_sparse_step", "num_experts"),
    ),
    "vmoe": Preset(
        PAPER + "2106.05974 and its code, github.com/google-research/vmoe",
        "images there, and batch-prioritised routing, which a causal decoder cannot have: set "
        "capacity_order='batch_prioritized' with allow_noncausal_routing=True for it. The weight of the losses is not the "
        "paper's",
        {
            "norm_topk_prob": False,
            "router_noise": "gaussian",
            "router_noise_affects": "both",
            "router_loss_coefs": {"importance_loss": 0.01, "load_loss": 0.01},
            "router_loss_kwargs": {"load_estimator": "vmoe"},
            **NO_LOSS,
        },
    ),
    "glam": Preset(
        PAPER + "2112.06905",
        "slots are per sequence and token by token, and evaluation is dropless",
        {
            **EVERY_OTHER,
            "num_experts": 64,
            "num_experts_per_tok": 2,
            "capacity_factor": 1.0,
            "router_z_loss_coef": 0.0,
        },
        not_read=("decoder_sparse_step", "num_experts", "num_experts_per_tok"),
    ),
    "pr_moe": Preset(
        PAPER + "2201.05596, the 350M model with 32 and 64 experts",
        "as there; dropless. Noise and order of the slots of its code are left out",
        {"num_experts": 64, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.01, "router_z_loss_coef": 0.0},
        _pr_moe,
    ),
    "st_moe": Preset(
        PAPER + "2202.08906, the 32B model",
        "an encoder and a decoder there; its capacity factor of 1.25 is of tokens, 0.625 of choices; evaluation is dropless",
        {
            "decoder_sparse_step": 4,
            "num_experts": 64,
            "router_type": "stochastic_top_k",
            "router_kwargs": {"policy": "random", "threshold": 0.2},
            "capacity_factor": 0.625,
            "router_aux_loss_coef": 0.01,
            "router_z_loss_coef": 0.001,
        },
        sums_layers=True,
    ),
    "expert_choice": Preset(
        PAPER + "2202.09368",
        "not causal: it cannot generate, and its loss as a language model means nothing; see expert_threshold",
        {
            **EVERY_OTHER,
            "router_type": "expert_choice",
            "allow_noncausal_routing": True,
            "num_experts": 64,
            "num_experts_per_tok": 2,
            **NO_LOSS,
        },
        not_read=("decoder_sparse_step", "num_experts", "num_experts_per_tok"),
    ),
    "deepseek_moe": Preset(
        PAPER + "2401.06066, the 16B model, and its code for the loss",
        "as there; dropless",
        {
            "num_experts": 64,
            "num_experts_per_tok": 6,
            "norm_topk_prob": False,
            "first_k_dense_replace": 1,
            "balance_loss_scope": "sequence",
            "router_aux_loss_coef": 0.001,
            "router_z_loss_coef": 0.0,
        },
        _deepseek_moe,
        sums_layers=True,
        not_read=("router_aux_loss_coef",),
    ),
    "mixtral": Preset(
        PAPER + "2401.04088, and transformers for the loss",
        "as there; the coefficient is twice that of transformers, whose loss is 2 at balance",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.002,
            "router_z_loss_coef": 0.0,
        },
    ),
    "dynamic_moe": Preset(
        PAPER + "2403.07652",
        "as there, with experts in the other half of the layers; the balance loss is 1 at balance, there as much as the "
        "experts per token",
        {
            **EVERY_OTHER,
            "router_type": "top_p",
            "router_kwargs": {"top_p": 0.4},
            "num_experts": 16,
            "router_aux_loss_coef": 0.01,
            "router_z_loss_coef": 0.0,
            "router_loss_coefs": {"local_entropy_loss": 1e-4},
        },
        not_read=("num_experts", "router_aux_loss_coef", "router_loss_coefs"),
    ),
    "lory": Preset(
        PAPER + "2405.03133",
        "the first segment is mixed evenly: there it is routed by itself, through which later tokens reach earlier ones",
        {
            "router_type": "segment_merge",
            "router_kwargs": {"segment_length": 256},
            "num_experts": 8,
            "num_experts_per_tok": 8,
            **NO_LOSS,
        },
        not_read=("num_experts", "router_kwargs"),
    ),
    "mh_moe": Preset(
        PAPER + "2411.16205",
        "as there",
        {"num_moe_heads": 2, "num_experts": 40, "num_experts_per_tok": 2},
        _mh_moe,
    ),
    "deepseek_v3": Preset(
        PAPER + "2412.19437, and transformers' DeepseekV3Config",
        "as there, without its sequence-wise loss of a very small weight; attention and MLP are those of text_config",
        {
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "scoring_func": "sigmoid",
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "balance_strategy": "bias",
            "router_z_loss_coef": 0.0,
        },
        _deepseek_v3,
    ),
    "expert_threshold": Preset(
        PAPER + "2603.11535",
        "as there; the momentum of the thresholds is not the paper's",
        {"router_type": "expert_threshold", "num_experts": 16, "num_experts_per_tok": 1, **NO_LOSS},
    ),
}


def preset_fields(name: str, text_config: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    """The fields of `MoEConfig` that preset `name` with `overrides` sets for a dense decoder.

    Raises:
        MoEError: an unknown name; or the preset needs the width of the dense MLP, which is under no name that is known.
    """
    preset = PRESETS.get(name)
    if preset is None:
        nearest = nearest_name(str(name), PRESETS)
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise MoEError(f"There is no preset {name!r}; there are {list(PRESETS)}.{hint}")
    fields, layers = dict(preset.fields), text_config.num_hidden_layers
    if preset.sized is not None:
        width = next((w for w in (getattr(text_config, known, None) for known in MLP_WIDTHS) if w), None)
        if not isinstance(width, int):
            raise MoEError(
                f"Preset {name!r} needs the width of the dense MLP, and text_config has none of {MLP_WIDTHS}."
            )
        fields |= preset.sized(layers, text_config.hidden_size, width)
    fields |= overrides
    if preset.sums_layers:
        step, dense = fields.get("decoder_sparse_step", 1), fields.get("first_k_dense_replace", 0)
        sparse = sum(i >= dense and (i + 1) % step == 0 for i in range(layers))
        for coefficient in {"router_aux_loss_coef", "router_z_loss_coef"} - overrides.keys():
            fields[coefficient] *= sparse
    return fields
