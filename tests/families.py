"""The dense families that become MoE models exactly, their unusual features, and what is refused with its reason."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Refusal:
    """A dense model that cannot become a MoE exactly, and what the error must say."""

    family: str
    reason: str
    fields: dict = field(default_factory=dict)


# Each is built by `tests.tiny_models.tiny_dense(name)`.
FAMILIES = (
    "apertus",
    "arcee",
    "bamba",
    "bart",
    "beam",
    "biogpt",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "cohere_compass_text",
    "cwm",
    "deepseek_v3",
    "diffllama",
    "doge",
    "ernie4_5",
    "exaone4",
    "falcon",
    "falcon_h1",
    "flint",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "gpt-sw3",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_japanese",
    "gptj",
    "granite",
    "granite_swa",
    "granitemoehybrid",
    "helium",
    "hunyuan_v1_dense",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jamba",
    "lfm2",
    "lfm3",
    "llama",
    "minicpm3",
    "ministral",
    "ministral3",
    "mistral",
    "modernbert-decoder",
    "moshi",
    "mpt",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "openai-gpt",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_5_text",
    "recurrent_gemma",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "trocr",
    "vaultgemma",
    "whisper",
    "xglm",
    "youtu",
)

WINDOW = {"sliding_window": 8}
ROPE = {"rope_theta": 10000.0}
LLAMA3_ROPE = {
    **ROPE,
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {**ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONG_ROPE = {
    **ROPE,
    "rope_type": "longrope",
    "short_factor": [1.1, 1.2, 1.3, 1.4],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 16,
}
MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.5,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
}

# name -> (family, fields): features that are off, or without effect on 32 tokens, at a family's defaults.
VARIANTS = {
    "apertus-silu": ("apertus", {"hidden_act": "silu"}),
    "arcee-biases": ("arcee", {"mlp_bias": True, "attention_bias": True}),
    "beam-window-soft-cap": ("beam", {**WINDOW, "final_logit_softcapping": 0.7}),
    "bloom-residual-after-norm": ("bloom", {"apply_residual_connection_post_layernorm": True}),
    "cohere-logit-scale": ("cohere", {"logit_scale": 0.7, "use_qk_norm": True, "attention_bias": True}),
    "cohere2-window": ("cohere2", {**WINDOW, "logit_scale": 2.0}),
    "cwm-window": ("cwm", WINDOW),
    "exaone4-window": ("exaone4", WINDOW),
    "falcon-alibi": ("falcon", {"alibi": True, "bias": True}),
    "falcon-new-decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-sequential": ("falcon", {"parallel_attn": False, "bias": True, "multi_query": False}),
    "falcon_h1-multipliers-outside-mlp": (
        "falcon_h1",
        {
            "lm_head_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "key_multiplier": 0.7,
            "attention_in_multiplier": 1.2,
            "attention_out_multiplier": 0.8,
            "ssm_in_multiplier": 1.3,
            "ssm_out_multiplier": 0.6,
            "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7],
        },
    ),
    "falcon_h1-biases": ("falcon_h1", {"mlp_bias": True, "attention_bias": True, "projectors_bias": True}),
    "gemma2-soft-caps-window": (
        "gemma2",
        {**WINDOW, "final_logit_softcapping": 0.8, "attn_logit_softcapping": 0.5},
    ),
    "gemma3_text-window": ("gemma3_text", {**WINDOW, "_sliding_window_pattern": 2}),
    "gemma3_text-soft-caps-untied": (
        "gemma3_text",
        {"final_logit_softcapping": 0.8, "attn_logit_softcapping": 0.5, "tie_word_embeddings": False},
    ),
    "gemma3_text-linear-rope": (
        "gemma3_text",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "sliding_attention": {**ROPE, "rope_type": "default"},
                "full_attention": {**ROPE, "rope_type": "linear", "factor": 8.0},
            },
        },
    ),
    "gemma3n_text-shared-keys-window": ("gemma3n_text", {**WINDOW, "num_kv_shared_layers": 1}),
    "gemma4_text-two-widths": (
        "gemma4_text",
        {
            **WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
        },
    ),
    "gemma4_text-soft-cap-window": ("gemma4_text", {**WINDOW, "final_logit_softcapping": 0.8}),
    "glm-biases": ("glm", {"attention_bias": True, "partial_rotary_factor": 0.25}),
    "gpt2-inverse-layer-scale": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_inner": None},
    ),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False, "activation_function": "relu"}),
    "gpt_bigcode-many-heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "gpt_neox-tied": ("gpt_neox", {"tie_word_embeddings": True}),
    "granite-multipliers": ("granite", MULTIPLIERS),
    "granite-biases": ("granite", {**MULTIPLIERS, "attention_bias": True, "mlp_bias": True}),
    "granite_swa-multipliers-window": ("granite_swa", {**MULTIPLIERS, **WINDOW}),
    "hunyuan_v1_dense-biases": ("hunyuan_v1_dense", {"attention_bias": True}),
    "hyperclovax-multipliers": ("hyperclovax", {**MULTIPLIERS, "mlp_bias": True, "use_post_norm": False}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-dynamic-rope": ("llama", {"rope_parameters": {**ROPE, "rope_type": "dynamic", "factor": 2.0}}),
    "llama-linear-rope": ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 3.0}}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "hidden_act": "gelu"}),
    "llama-yarn-rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "ministral-window": ("ministral", WINDOW),
    "mistral-window": ("mistral", WINDOW),
    "mpt-clip-qkv": ("mpt", {"attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}}),
    "nanochat-soft-cap": ("nanochat", {"final_logit_softcapping": 0.7}),
    "nemotron-biases": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "olmo-clip-qkv": ("olmo", {"clip_qkv": 0.5, "tie_word_embeddings": True}),
    "olmo3-window": ("olmo3", WINDOW),
    "opt-no-affine-untied": (
        "opt",
        {"layer_norm_elementwise_affine": False, "enable_bias": False, "tie_word_embeddings": False},
    ),
    "opt-norm-after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 20}),
    "openai-gpt-silu": ("openai-gpt", {"afn": "silu"}),
    "persimmon-no-query-norm": ("persimmon", {"qk_layernorm": False}),
    "phi-query-norm": ("phi", {"qk_layernorm": True, "partial_rotary_factor": 0.25}),
    "phi3-window-long-rope": (
        "phi3",
        {**WINDOW, "rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16},
    ),
    "qwen2-window": ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen2-yarn-rope-tied": ("qwen2", {"rope_parameters": YARN_ROPE, "tie_word_embeddings": True}),
    "qwen3-window-biases": (
        "qwen3",
        {**WINDOW, "use_sliding_window": True, "max_window_layers": 1, "attention_bias": True},
    ),
    "recurrent_gemma-window": ("recurrent_gemma", {"attention_window_size": 8, "logits_soft_cap": 0.8}),
    "seed_oss-no-biases": ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "smollm3-window": (
        "smollm3",
        {**WINDOW, "use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}
        | {"num_hidden_layers": 4},
    ),
    "stablelm-parallel": (
        "stablelm",
        {"use_parallel_residual": True, "use_qkv_bias": True, "qk_layernorm": True},
    ),
    "starcoder2-window-no-bias": ("starcoder2", {**WINDOW, "use_bias": False, "tie_word_embeddings": False}),
    "vaultgemma-soft-caps-window": (
        "vaultgemma",
        {**WINDOW, "final_logit_softcapping": 0.8, "attn_logit_softcapping": 0.5},
    ),
    "xglm-unscaled-untied": ("xglm", {"scale_embedding": False, "tie_word_embeddings": False}),
}

# Structurally different, for the run after every change: gated; fused; Conv1D with biases; inline; residual inside the
# MLP; parallel residual; attention beside mamba; post norms; soft caps with a window; an activation with parameters.
SLICE = (
    "llama",
    "phi3",
    "gpt2",
    "opt",
    "bloom",
    "falcon-alibi",
    "falcon_h1",
    "gemma3_text-window",
    "gemma2-soft-caps-window",
    "apertus",
    "granite-multipliers",
)

# Hybrid decoders with an MLP in some layers only: how many have one in the tiny model.
MOE_LAYERS = {"nemotron_h": 1}

# The dense model itself cannot checkpoint.
WITHOUT_CHECKPOINTING = ("gpt_neox_japanese", "openai-gpt")

REFUSED = {
    "sub-norm-inside-mlp": Refusal("bitnet", "ffn_sub_norm"),
    "scale-inside-mlp": Refusal("inkling_text", "global_scale"),
    "multipliers-inside-mlp": Refusal("falcon_h1", "multipliers", {"mlp_multipliers": [0.8, 1.3]}),
    "activation-sparsity": Refusal("gemma3n_text", "sparsity", {"activation_sparsity_pattern": [0.9, 0.0, 0.0]}),
    "moe-mixtral": Refusal("mixtral", "already has experts", {"num_local_experts": 4}),
    "moe-qwen3_moe": Refusal("qwen3_moe", "already has experts", {"num_experts": 4, "moe_intermediate_size": 40}),
    "moe-beside-mlp": Refusal("granitemoehybrid", "already has experts", {"num_local_experts": 4}),
    "moe-of-parallel-experts": Refusal("granitemoe", "already has experts", {"num_local_experts": 4}),
    "moe-gemma4_text": Refusal(
        "gemma4_text",
        "already has experts",
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 40},
    ),
    "encoder": Refusal("bert", "not a decoder"),
    "encoder-as-decoder": Refusal("bert", "no decoder layer with a known MLP", {"is_decoder": True}),
    "state-space-without-mlp": Refusal("mamba", "no decoder layer with a known MLP"),
    "recurrent-mixer": Refusal("rwkv", "no decoder layer with a known MLP"),
    "mlp-in-a-sequential": Refusal("ctrl", "no decoder layer with a known MLP"),
    "one-mlp-shared-by-layers": Refusal("zamba", "no decoder layer with a known MLP"),
}
