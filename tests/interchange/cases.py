"""Pairs of dense and native families that are exchanged exactly, and those that are refused, with the reason."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

import moe_hf
from tests.families import MULTIPLIERS, VARIANTS
from tests.tiny_models import randomise_, tiny_dense


SIGMOID = {"scoring_func": "sigmoid"}
GATED = {"shared_expert_intermediate_size": 104, "shared_expert_gate": True}
SHARED = {"shared_expert_intermediate_size": 2 * 88}
FIRST_DENSE = {"first_k_dense_replace": 1}
FULL = {"layer_types": ["full_attention"] * 3}


@dataclass(frozen=True)
class Case:
    """A dense family (or a variant of `tests.families`), its fields, those of the MoE, and a native family.

    `says` is what a refusal must say; None for a pair that is exact.
    """

    dense: str
    target: str
    fields: dict = field(default_factory=dict)
    moe: dict = field(default_factory=dict)
    says: str | None = None

    def dense_model(self):
        """The tiny dense model."""
        family, variant = VARIANTS.get(self.dense, (self.dense, {}))
        return tiny_dense(family, **{**variant, **self.fields})


EXACT = {
    "llama-mixtral": Case("llama", "mixtral"),
    "llama-tied-mixtral": Case("llama-tied", "mixtral"),
    "llama3-rope-mixtral": Case("llama-llama3-rope", "mixtral"),
    "mistral-mixtral": Case("mistral", "mixtral"),
    "mistral-window-mixtral": Case("mistral-window", "mixtral"),
    "phi3-mixtral": Case("phi3", "mixtral"),
    "seed_oss-mixtral": Case("seed_oss", "mixtral", {"attention_bias": False}),
    "smollm3-mixtral": Case("smollm3", "mixtral", {"no_rope_layers": [1, 1, 1]}),
    "narrow-experts-mixtral": Case("llama", "mixtral", moe={"moe_intermediate_size": 40}),
    "qwen2-qwen2_moe": Case("qwen2", "qwen2_moe"),
    "qwen2-window-qwen2_moe": Case("qwen2-window", "qwen2_moe", moe=GATED),
    "qwen2-not-normalised-qwen2_moe": Case("qwen2", "qwen2_moe", moe={"norm_topk_prob": False}),
    "llama-qwen2_moe": Case("llama", "qwen2_moe", moe=GATED | {"decoder_sparse_step": 2}),
    "mistral-qwen2_moe": Case("mistral", "qwen2_moe", {"sliding_window": None}, {"mlp_only_layers": [1]}),
    "seed_oss-qwen2_moe": Case("seed_oss", "qwen2_moe"),
    "qwen3-qwen3_moe": Case("qwen3", "qwen3_moe"),
    "qwen3-partly-qwen3_moe": Case("qwen3", "qwen3_moe", {"attention_bias": True}, {"mlp_only_layers": [0, 2]}),
    "qwen3-glm4_moe": Case("qwen3", "glm4_moe", moe=SIGMOID | FIRST_DENSE),
    "qwen2-glm4_moe": Case("qwen2", "glm4_moe", moe=SIGMOID | {"routed_scaling_factor": 2.5}),
    "llama-glm4_moe": Case("llama", "glm4_moe", moe=SIGMOID | SHARED | {"norm_topk_prob": False}),
    "mistral-glm4_moe": Case("mistral", "glm4_moe", {"sliding_window": None}, SIGMOID),
    "seed_oss-glm4_moe": Case("seed_oss", "glm4_moe", moe=SIGMOID),
    "glm-glm4_moe": Case("glm", "glm4_moe", moe=SIGMOID | FIRST_DENSE),
    "qwen3-dots1": Case("qwen3-window-biases", "dots1", moe=SIGMOID | SHARED),
    "llama-solar_open": Case("llama", "solar_open", moe=SIGMOID),
    "qwen2-solar_open": Case("qwen2", "solar_open", moe=SIGMOID | SHARED),
    "llama-granitemoe": Case("llama", "granitemoe", {"attention_bias": True}),
    "granite-granitemoe": Case("granite-multipliers", "granitemoe"),
    "granite-granitemoeshared": Case("granite", "granitemoeshared", MULTIPLIERS, SHARED),
    "llama-granitemoeshared": Case("llama", "granitemoeshared", moe={"shared_expert_intermediate_size": 24}),
    "granite_swa-granitemoe_swa": Case("granite_swa-multipliers-window", "granitemoe_swa", moe=SHARED),
    "ernie4_5-ernie4_5_moe": Case("ernie4_5", "ernie4_5_moe"),
    "ernie4_5-partly-ernie4_5_moe": Case("ernie4_5", "ernie4_5_moe", moe=SHARED | {"decoder_sparse_step": 2}),
    "hunyuan-hunyuan_v1_moe": Case("hunyuan_v1_dense-biases", "hunyuan_v1_moe"),
    "hunyuan-shared-hunyuan_v1_moe": Case(
        "hunyuan_v1_dense", "hunyuan_v1_moe", moe={"shared_expert_intermediate_size": 88}
    ),
    "olmo2-flex_olmo": Case("olmo2", "flex_olmo"),
    "olmo3-flex_olmo": Case("olmo3", "flex_olmo", FULL, {"norm_topk_prob": False}),
    "cohere2-cohere2_moe": Case("cohere2-window", "cohere2_moe", {"rope_parameters": {"rope_theta": 7e3}}),
    "cohere2-partly-cohere2_moe": Case(
        "cohere2-window", "cohere2_moe", moe=SHARED | SIGMOID | {"mlp_only_layers": [1]}
    ),
    "qwen3_5-qwen3_5_moe_text": Case("qwen3_5_text", "qwen3_5_moe_text"),
    "qwen3_5-shared-qwen3_5_moe_text": Case("qwen3_5_text", "qwen3_5_moe_text", moe=GATED),
    "lfm2-lfm2_moe": Case("lfm2", "lfm2_moe", moe=SIGMOID | FIRST_DENSE),
}

REFUSED = {
    "biases-mixtral": Case("llama", "mixtral", {"attention_bias": True}, says="attention_bias=True of llama"),
    "mlp-biases-mixtral": Case("llama", "mixtral", {"mlp_bias": True}, says="mlp_bias=True"),
    "no-position-mixtral": Case(
        "smollm3", "mixtral", {"no_rope_layers": [1, 1, 0]}, says=r"layers \[2\] have no position"
    ),
    "partial-rotation-mixtral": Case(
        "phi3",
        "mixtral",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        says="partial_rotary_factor=0.5",
    ),
    "long-rope-mixtral": Case("phi3-window-long-rope", "mixtral", says="rope_type='longrope'"),
    "query-norms-mixtral": Case("qwen3", "mixtral", says="without biases or norms of its own.*and qwen3 does not"),
    "no-query-norms-qwen3_moe": Case("llama", "qwen3_moe", says="normalises queries and keys per head"),
    "sigmoid-mixtral": Case("llama", "mixtral", moe=SIGMOID, says="scoring_func='sigmoid'"),
    "dense-layer-mixtral": Case("llama", "mixtral", moe={"moe_dense_ffn": "before"}, says="moe_dense_ffn='before'"),
    "predictions-mixtral": Case(
        "llama",
        "mixtral",
        moe={"router_type": "dense", "num_experts_per_tok": 4, "output_mixture": "likelihood"},
        says="router_type='dense'",
    ),
    "softmax-glm4_moe": Case("llama", "glm4_moe", says="scoring_func='softmax'"),
    "scale-mixtral": Case("llama", "mixtral", moe={"routed_scaling_factor": 2.0}, says="no such factor"),
    "cosine-mixtral": Case("llama", "mixtral", moe={"router_arch": "cosine"}, says="router_arch='cosine'"),
    "fewer-experts-mixtral": Case(
        "llama", "mixtral", moe={"num_experts_per_layer": [2, 4, 4]}, says=r"num_experts_per_layer=\[2, 4, 4\]"
    ),
    "softmax-gate-qwen2": Case(
        "qwen2",
        "qwen2_moe",
        moe={"shared_expert_intermediate_size": 88, "shared_expert_gate": "softmax"},
        says="shared_expert_gate='softmax'",
    ),
    "bias-mixtral": Case("llama", "mixtral", moe={"balance_strategy": "bias"}, says="no bias for choosing"),
    "groups-glm4": Case("llama", "glm4_moe", moe=SIGMOID | {"n_group": 2, "topk_group": 1}, says="n_group=2"),
    "learned-noise-mixtral": Case(
        "llama",
        "mixtral",
        moe={"router_noise": "learned", "router_noise_affects": "both"},
        says="no weights for noise",
    ),
    "not-normalised-mixtral": Case("llama", "mixtral", moe={"norm_topk_prob": False}, says="norm_topk_prob=False"),
    "not-normalised-granitemoe": Case("granite", "granitemoe", moe={"norm_topk_prob": False}, says="always divides"),
    "not-normalised-softmax-cohere2_moe": Case(
        "cohere2", "cohere2_moe", moe={"norm_topk_prob": False}, says="always divides"
    ),
    "one-expert-per-token-mixtral": Case(
        "llama", "mixtral", moe={"num_experts_per_tok": 1}, says="norm_topk_prob=False"
    ),
    "shared-mixtral": Case("llama", "mixtral", moe=SHARED, says="has no shared expert"),
    "ungated-qwen2_moe": Case("qwen2", "qwen2_moe", moe=SHARED, says="its shared expert has a gate"),
    "gated-glm4_moe": Case("llama", "glm4_moe", moe=SIGMOID | GATED, says="its shared expert does not have a gate"),
    "odd-width-glm4_moe": Case(
        "llama", "glm4_moe", moe=SIGMOID | {"shared_expert_intermediate_size": 100}, says="multiples of"
    ),
    "wide-shared-hunyuan": Case("hunyuan_v1_dense", "hunyuan_v1_moe", moe=SHARED, says="as wide as a routed one, 88"),
    "partly-mixtral": Case("llama", "mixtral", moe=FIRST_DENSE, says=r"layers \[0\] are dense, and all"),
    "last-dense-glm4_moe": Case(
        "llama", "glm4_moe", moe=SIGMOID | {"mlp_only_layers": [2]}, says="only the first layers"
    ),
    "holes-ernie4_5_moe": Case(
        "ernie4_5", "ernie4_5_moe", {"num_hidden_layers": 5}, {"mlp_only_layers": [2]}, says="in each n-th layer"
    ),
    "window-qwen3_moe": Case("qwen3-window-biases", "qwen3_moe", says=r"layers \[1, 2\] attend within a window of 8"),
    "window-flex_olmo": Case("olmo3", "flex_olmo", says="attend within a window of 4096"),
    "window-glm4_moe": Case("mistral-window", "glm4_moe", moe=SIGMOID, says="attend within a window of 8"),
    "output-bias-glm4_moe": Case("qwen3", "glm4_moe", {"attention_bias": True}, SIGMOID, says="attention_bias=True"),
    "sandwich-norms": Case("gemma2", "mixtral", says="norms around attention and MLP both"),
    "sandwich-norms-glm4": Case("glm4", "glm4_moe", moe=SIGMOID, says="norms around attention and MLP both"),
    "layer-norm": Case("gpt2", "mixtral", says="LayerNorm with biases"),
    "squared-relu": Case("arcee", "mixtral", says="squared ReLU"),
    "norms-without-weights": Case("olmo", "flex_olmo", says="norms have no weights"),
}


def native_fields(target: str) -> dict:
    """Sizes of a tiny native model of a family: 4 experts, 2 per token, widths that differ."""
    from moe_hf.interchange.families import FAMILIES

    family = FAMILIES[target]
    fields = {family.num_experts: 4, family.num_experts_per_tok: 2}
    fields |= {} if family.width == "intermediate_size" else {family.width: 40}
    if family.shared is not None and family.shared.field is not None:
        fields[family.shared.field] = 24 if family.shared.unit == "1" else 2
    return fields


@torch.no_grad()
def tell_apart_(model, seed: int = 5) -> None:
    """Redraw experts, routers and shared experts, so that no two are alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if any(part in name for part in (".experts.", ".gate.weight", ".shared_expert")):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)


def upcycled(case: Case, *, apart: bool = True):
    """The dense model of a case, and its MoE; `apart`: with experts that differ."""
    dense = case.dense_model()
    fields = {"num_experts": 4, "num_experts_per_tok": 2, **case.moe}
    if "moe_intermediate_size" in fields:
        # No copies of the dense MLP: random weights everywhere.
        moe = moe_hf.MoEForCausalLM(moe_hf.MoEConfig(text_config=dense.config, **fields)).eval()
        randomise_(moe)
    else:
        moe = moe_hf.upcycle(dense, allow_inexact=True, **fields)
    if apart:
        tell_apart_(moe)
    return dense, moe


def files(folder: Path) -> dict[str, bytes]:
    """The weight files of a checkpoint, byte by byte."""
    return {file.name: file.read_bytes() for file in Path(folder).glob("model*")}
