"""The MoE families of transformers that our checkpoints are exchanged with, one description each.

To add a family: its names on the disk, how its router weights experts, and the dense families whose attention and norms
it has. `tests/interchange` compares every pair with transformers' own model.

Letters: F expert width, K experts per token.
"""

from typing import Any

from transformers import PreTrainedConfig

from moe_hf.interchange.description import (
    LAYER_INTERVAL,
    LAYER_TYPES,
    LISTED_LAYERS,
    Check,
    Family,
    Names,
    SharedExpert,
    Twin,
    first_layers,
)


def _head_dim(dense: PreTrainedConfig) -> int:
    return getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads


def _windows(dense: PreTrainedConfig) -> str | None:
    kinds = getattr(dense, "layer_types", None)
    window = getattr(dense, "sliding_window", None)
    layers = [layer for layer, kind in enumerate(kinds) if kind != "full_attention"] if kinds else []
    if layers or (window and not kinds):
        return f"layers {layers or 'all'} attend within a window of {window} tokens, and it has none"
    return None


def _rotation(dense: PreTrainedConfig) -> str | None:
    factor = dense.rope_parameters.get("partial_rotary_factor", 1.0)
    return None if factor == 1.0 else f"partial_rotary_factor={factor}, and it rotates the whole head"


def _plain_rope(dense: PreTrainedConfig) -> str | None:
    kind = dense.rope_parameters["rope_type"]
    return None if kind == "default" else f"its own form of rope_type={kind!r} depends on fields that it does not have"


def _rope_everywhere(dense: PreTrainedConfig) -> str | None:
    layers = [layer for layer, rotates in enumerate(dense.no_rope_layers) if not rotates]
    return (
        f"layers {layers} have no position embedding (no_rope_layers), and all of its layers have" if layers else None
    )


def _no_reason(dense: PreTrainedConfig) -> None:
    return None


NO_WINDOW = Check(("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"), _windows)
WHOLE_ROTATION = Check(("rope_parameters",), _rotation)
PLAIN_ROPE = Check(("rope_parameters", "original_max_position_embeddings"), _plain_rope)
ROPE_EVERYWHERE = Check(("no_rope_layers",), _rope_everywhere)


def _twin(*checks: Check, requires: dict[str, Any] | None = None, sets: dict[str, Any] | None = None, **more) -> Twin:
    return Twin(requires=requires or {}, checks=(WHOLE_ROTATION, *checks), sets=sets or {}, **more)


def _lfm2_width(dense: PreTrainedConfig) -> int:
    width = dense.intermediate_size
    if dense.block_auto_adjust_ff_dim:
        width = int(2 * width / 3)
        if dense.block_ffn_dim_multiplier is not None:
            width = int(dense.block_ffn_dim_multiplier * width)
            width = -(-width // dense.block_multiple_of) * dense.block_multiple_of
    return width


def _projections(prefix: str) -> tuple[str, str, str]:
    return f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"


def _names(**more) -> Names:
    return Names("mlp.gate.weight", _projections("mlp.experts.{e}"), **more)


NO_BIAS = {"attention_bias": False, "mlp_bias": False}
QKV_BIAS = {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}
PHI3_SPLITS = {
    "self_attn.qkv_proj.weight": tuple(f"self_attn.{name}_proj.weight" for name in "qkv"),
    "mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
}
SMOLLM3_CHECKS = (NO_WINDOW, ROPE_EVERYWHERE)
FULL_ATTENTION = {"use_sliding_window": False, "sliding_window": None}
SIGMOID = {"scoring": {"sigmoid": None}, "routed_scaling_factor": "routed_scaling_factor", "least_experts": 2}
# One group of experts: the choice is among all of them.
DEEPSEEK_ROUTING = SIGMOID | {
    "num_experts": "n_routed_experts",
    "constants": {"n_group": 1, "topk_group": 1},
    "shared": SharedExpert("n_shared_experts", unit="F", least=1),
}
DEEPSEEK_NAMES = _names(shared=_projections("mlp.shared_experts"), correction_bias="mlp.gate.e_score_correction_bias")
# glm4_moe rotates half of each head if it is not told otherwise.
WHOLE_HEAD = {"rope_parameters": lambda dense: {**dense.rope_parameters, "partial_rotary_factor": 1.0}}
GRANITE_MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": lambda dense: _head_dim(dense) ** -0.5,
}
GRANITE_BLOCK = {
    "router": "block_sparse_moe.router.layer.weight",
    "experts": ("block_sparse_moe.input_linear.weight",) * 2 + ("block_sparse_moe.output_linear.weight",),
}
GRANITE_SHARED = ("shared_mlp.input_linear.weight",) * 2 + ("shared_mlp.output_linear.weight",)
GRANITE = {
    "num_experts": "num_local_experts",
    "width": "intermediate_size",
    "dense_width": None,
    "norm_topk_prob": None,
    "servers_divide": "vLLM and llama.cpp",
}

# In the order in which "auto" tries them. First those that hold a model as it is, and among them those that most servers
# read; then those that need an expert of zeros beside the model's own.
FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        decoder="attention without biases or norms of its own, in every layer alike",
        names=Names(
            "block_sparse_moe.gate.weight",
            tuple(f"block_sparse_moe.experts.{{e}}.{w}.weight" for w in ("w1", "w3", "w2")),
        ),
        twins={
            "mistral": _twin(),
            "llama": _twin(requires=NO_BIAS),
            "phi3": _twin(PLAIN_ROPE, splits=PHI3_SPLITS),
            "seed_oss": _twin(requires=NO_BIAS | {"attention_out_bias": False}),
            "smollm3": _twin(*SMOLLM3_CHECKS, requires=NO_BIAS, sets={"sliding_window": None}),
        },
        num_experts="num_local_experts",
        width="intermediate_size",
        dense_width=None,
        norm_topk_prob=None,
    ),
    "qwen3_moe": Family(
        decoder="attention that normalises queries and keys per head",
        names=_names(),
        twins={"qwen3": _twin(NO_WINDOW, sets=FULL_ATTENTION)},
        layers=LISTED_LAYERS,
        gguf_norm=True,
    ),
    "granitemoe": Family(
        decoder="attention with one bias switch, and four multipliers",
        names=Names(**GRANITE_BLOCK),
        twins={
            "granite": _twin(requires={"mlp_bias": False}),
            "llama": _twin(requires={"mlp_bias": False}, sets=GRANITE_MULTIPLIERS),
        },
        **GRANITE,
    ),
    "ernie4_5_moe": Family(
        decoder="attention with one bias switch, and rotation of neighbouring dimensions",
        names=_names(
            shared=_projections("mlp.shared_experts"), correction_bias="mlp.moe_statics.e_score_correction_bias"
        ),
        twins={"ernie4_5": _twin(requires={"use_bias": False})},
        num_experts="moe_num_experts",
        num_experts_per_tok="moe_k",
        norm_topk_prob=None,
        shared=SharedExpert("moe_num_shared_experts", unit="F"),
        layers=LAYER_INTERVAL,
    ),
    "lfm2_moe": Family(
        decoder="short convolutions between layers of attention",
        names=Names(
            "feed_forward.gate.weight",
            tuple(f"feed_forward.experts.{{e}}.{w}.weight" for w in ("w1", "w3", "w2")),
            correction_bias="feed_forward.expert_bias",
        ),
        twins={"lfm2": _twin(dense_width=_lfm2_width, restores={"block_auto_adjust_ff_dim": lambda native: False})},
        layers=first_layers("num_dense_layers"),
        constants={"use_expert_bias": True},
        note="lfm2_moe adds 1e-6 to the sum of a token's scores: its weights are smaller by that over the sum",
        **SIGMOID | {"least_experts": 1},
    ),
    "flex_olmo": Family(
        decoder="norms after attention and MLP, and queries and keys normalised over all heads",
        names=_names(),
        twins={
            "olmo2": _twin(),
            "olmo3": Twin(
                checks=(NO_WINDOW, Check(("rope_parameters",), _no_reason)),
                sets={"rope_parameters": lambda dense: dense.rope_parameters["full_attention"]},
                restores={"rope_parameters": lambda native: {"full_attention": native.rope_parameters}},
            ),
        },
        width="intermediate_size",
        dense_width=None,
    ),
    "cohere2_moe": Family(
        decoder="attention beside the MLP, and rotation in windowed layers alone",
        names=_names(shared=_projections("mlp.shared_experts")),
        twins={
            "cohere2": _twin(
                sets={
                    "rope_parameters": lambda dense: dense.rope_parameters,
                    "rope_theta": lambda dense: dense.rope_parameters["rope_theta"],
                }
            )
        },
        width="intermediate_size",
        dense_width="prefix_dense_intermediate_size",
        scoring={"softmax": "softmax", "sigmoid": "sigmoid"},
        scoring_field="expert_selection_fn",
        shared=SharedExpert("num_shared_experts", unit="F"),
        layers=LAYER_TYPES,
        constants={
            "shared_expert_combination_strategy": lambda config: (
                "sum" if config.shared_expert_intermediate_size else "average"
            ),
            "rms_norm_eps": None,
        },
    ),
    "granitemoeshared": Family(
        decoder="attention with one bias switch, and four multipliers",
        names=Names(**GRANITE_BLOCK, shared=GRANITE_SHARED),
        twins={
            "granite": _twin(requires={"mlp_bias": False}),
            "llama": _twin(requires={"mlp_bias": False}, sets=GRANITE_MULTIPLIERS),
        },
        shared=SharedExpert("shared_intermediate_size"),
        **GRANITE,
    ),
    "granitemoe_swa": Family(
        decoder="attention with sinks, windows and a rotation base per layer, and four multipliers",
        names=Names(
            "block_sparse_moe.router.weight",
            ("block_sparse_moe.experts.gate_up_proj",) * 2 + ("block_sparse_moe.experts.down_proj",),
            shared=GRANITE_SHARED,
        ),
        twins={"granite_swa": _twin(requires={"mlp_bias": False})},
        shared=SharedExpert("shared_intermediate_size"),
        **GRANITE,
    ),
    "hunyuan_v1_moe": Family(
        decoder="attention that normalises queries and keys after rotating them",
        names=Names("mlp.gate.wg.weight", _projections("mlp.experts.{e}"), shared=_projections("mlp.shared_mlp")),
        twins={"hunyuan_v1_dense": _twin()},
        num_experts_per_tok="moe_topk",
        width="intermediate_size",
        dense_width=None,
        norm_topk_prob=None,
        shared=SharedExpert(None, unit="F", least=1),
    ),
    "qwen3_5_moe_text": Family(
        decoder="linear attention between layers of gated attention",
        names=_names(shared=_projections("mlp.shared_expert"), shared_gate="mlp.shared_expert_gate.weight"),
        twins={"qwen3_5_text": Twin()},
        dense_width=None,
        norm_topk_prob=None,
        shared=SharedExpert("shared_expert_intermediate_size", gated=True, least=32),
    ),
    "qwen2_moe": Family(
        decoder="attention whose output projection has no bias",
        names=_names(shared=_projections("mlp.shared_expert"), shared_gate="mlp.shared_expert_gate.weight"),
        twins={
            "qwen2": _twin(sets={"qkv_bias": True}),
            "llama": _twin(requires=NO_BIAS, sets={"qkv_bias": False} | FULL_ATTENTION),
            "mistral": _twin(NO_WINDOW, sets={"qkv_bias": False} | FULL_ATTENTION),
            "seed_oss": _twin(requires=QKV_BIAS, sets={"qkv_bias": True} | FULL_ATTENTION),
        },
        shared=SharedExpert("shared_expert_intermediate_size", gated=True, least=32),
        layers=LISTED_LAYERS,
        gguf_norm=False,
        servers_divide="vLLM and llama.cpp",
    ),
    "glm4_moe": Family(
        decoder="attention whose output projection has no bias, with or without normalised queries and keys",
        names=DEEPSEEK_NAMES,
        twins={
            "qwen3": _twin(NO_WINDOW, requires={"attention_bias": False}, sets={"use_qk_norm": True} | WHOLE_HEAD),
            "qwen2": _twin(NO_WINDOW, sets={"use_qk_norm": False, "attention_bias": True} | WHOLE_HEAD),
            "llama": _twin(requires=NO_BIAS, sets={"use_qk_norm": False} | WHOLE_HEAD),
            "mistral": _twin(NO_WINDOW, sets={"use_qk_norm": False, "attention_bias": False} | WHOLE_HEAD),
            "seed_oss": _twin(requires=QKV_BIAS, sets={"use_qk_norm": False} | WHOLE_HEAD),
            "glm": Twin(
                sets={"use_qk_norm": False},
                splits={"mlp.gate_up_proj.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight")},
                rotates_neighbours=True,
            ),
        },
        layers=first_layers("first_k_dense_replace"),
        **DEEPSEEK_ROUTING | {"constants": DEEPSEEK_ROUTING["constants"] | {"num_mtp_layers": 0}},
    ),
    "dots1": Family(
        decoder="attention that normalises queries and keys per head",
        names=DEEPSEEK_NAMES,
        twins={
            "qwen3": _twin(
                Check(("use_sliding_window",), _no_reason),  # layer_types and sliding_window say it all
                restores={"use_sliding_window": lambda native: native.sliding_window is not None},
            )
        },
        layers=first_layers("first_k_dense_replace"),
        servers_read={"scoring_func": "sigmoid"},
        **DEEPSEEK_ROUTING,
    ),
    "solar_open": Family(
        decoder="attention whose output projection has no bias",
        names=DEEPSEEK_NAMES,
        twins={
            "llama": _twin(requires=NO_BIAS),
            "qwen2": _twin(NO_WINDOW, sets={"attention_bias": True}),
        },
        dense_width=None,
        **DEEPSEEK_ROUTING,
    ),
}

_AROUND = "it has norms around attention and MLP both"
_LAYER_NORM = "it has LayerNorm with biases, and an MLP with biases or without a gate"
# Dense families that no native MoE family can hold, and why.
WITHOUT_TARGET: dict[str, str] = {
    "arcee": "its MLP is a squared ReLU without a gate",
    "exaone4": "its norms stand after attention and MLP, and per-head norms within attention",
    "gemma": "its norms multiply by 1 + weight, and it scales its embeddings",
    "gemma2": _AROUND,
    "gemma3_text": _AROUND,
    "glm4": _AROUND,
    "nemotron": "its MLP is a squared ReLU without a gate",
    "olmo": "its norms have no weights, and it clips queries, keys and values",
    **dict.fromkeys(("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj"), _LAYER_NORM),
    **dict.fromkeys(("mpt", "opt", "persimmon", "phi", "stablelm", "starcoder2"), _LAYER_NORM),
}

# Native families without a dense twin, and why.
WITHOUT_TWIN: dict[str, str] = {
    "dbrx": "its clipped attention with LayerNorm has no dense family",
    "deepseek_v2": "the weights of a token are scaled, and chosen within groups of experts",
    "deepseek_v3": "its experts are chosen within groups, with a bias for choosing that our router does not have",
    "gpt_oss": "its attention has sinks, and its experts are clamped and biased",
    "jetmoe": "its attention has experts too",
    "llama4_text": "its router scales the input of the experts, not their output",
    "minimax_m2": "it normalises queries and keys over all heads before its MLP; no dense family does",
    "olmoe": "it normalises queries and keys over all heads and has its norms in front; no dense family does",
    "phimoe": "its router mixes by SparseMixer, and it has LayerNorm with biases",
}
