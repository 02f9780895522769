"""What each family needs, beyond the sizes all share, to be tiny, and to be a dense decoder at all."""

ROPE_PER_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
}
MAMBA = {
    "mamba_n_heads": 12,
    "mamba_d_head": 8,
    "mamba_d_state": 10,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}
LATENT_ATTENTION = {
    "num_key_value_heads": 6,
    "head_dim": 8,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}
HYBRID = ["linear_attention", "full_attention", "linear_attention"]
LINEAR_ATTENTION = {
    "layer_types": HYBRID,
    "linear_num_key_heads": 3,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
}
SHARED_ATTENTION = {
    "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
    "num_key_value_heads": 6,
    "mamba_d_state": 10,
    "use_mamba_kernels": False,
}
DECODER_OF_PAIR = {
    "d_model": 48,
    "decoder_layers": 3,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 88,
    "encoder_layers": 3,
    "encoder_ffn_dim": 72,
    # Generation settings in a model's config are refused by `generate` and `save_pretrained`.
    "forced_eos_token_id": None,
}

FAMILY_FIELDS = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "bart": DECODER_OF_PAIR,
    "beam": {"mlp_layer_types": ["dense"] * 3},
    "bloom": {"num_attention_heads": 4},
    "codegen": {"rotary_dim": 4, "num_attention_heads": 4},
    "cohere_compass_text": {"num_key_value_heads": 6, "rope_parameters": ROPE_PER_TYPE},
    "deepseek_v3": {**LATENT_ATTENTION, "first_k_dense_replace": 3},
    "doge": {"keep_window_size": 64},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 96},
    "flint": {"mlp_only_layers": [0, 1, 2]},
    "gemma3n_text": {
        "intermediate_size": [88] * 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "activation_sparsity_pattern": [0.0] * 3,
        "num_kv_shared_layers": 0,
        "vocab_size_per_layer_input": 101,
        "hidden_size_per_layer_input": 12,
        "laurel_rank": 10,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 113, "hidden_size_per_layer_input": 12},
    "gemma4_unified_text": {"vocab_size_per_layer_input": 113, "hidden_size_per_layer_input": 12},
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]], "window_size": 8},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        **MAMBA,
        "mamba_d_head": "auto",
        "num_local_experts": 0,
        "shared_intermediate_size": 88,
        "layer_types": HYBRID,
    },
    "helium": {"head_dim": 8},
    "inkling_text": {
        "swa_num_attention_heads": 6,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "mlp_layer_types": ["dense"] * 3,
    },
    "jamba": {
        "num_experts": 1,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "mamba_d_state": 10,
        "mamba_dt_rank": 5,
        "use_mamba_kernels": False,
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False},
    "lfm3": {"layer_types": ["conv", "full_attention", "sliding_attention"]},
    "minicpm3": {**LATENT_ATTENTION, "dim_model_base": 16},
    "moshi": {"ffn_dim": 176, "audio_vocab_size": 113},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
        "mamba_num_heads": 12,
        "mamba_head_dim": 8,
        "ssm_state_size": 10,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "olmo_hybrid": {**LINEAR_ATTENTION, "linear_num_value_heads": 3},
    "qwen3_5_text": {**LINEAR_ATTENTION, "linear_num_value_heads": 6},
    "recurrent_gemma": {"lru_width": 60, "block_types": ["recurrent", "attention", "recurrent"]},
    "t5": {"d_model": 48, "d_ff": 88, "d_kv": 16, "num_layers": 3, "num_heads": 6},
    "trocr": DECODER_OF_PAIR,
    "whisper": {**DECODER_OF_PAIR, "max_target_positions": 80, "begin_suppress_tokens": None},
    # Loading it zeroes the embedding of the padding token, so that a padding token would break its round trip.
    "youtu": {**LATENT_ATTENTION, "pad_token_id": None},
    "zamba": {
        **SHARED_ATTENTION,
        "attention_hidden_size": 96,
        "attention_head_dim": 16,
        "n_mamba_heads": 2,
        "mamba_dt_rank": 5,
    },
    "zamba2": {**SHARED_ATTENTION, "n_mamba_heads": 12, "chunk_size": 8},
}
