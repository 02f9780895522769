"""The configuration of a MoE model: the dense model's own configuration, nested, plus the fields of its experts.

Letters: D model width, F expert width, E experts, K experts per token.
"""

import os
from typing import Any, ClassVar

import torch
import transformers
from huggingface_hub.dataclasses import strict
from packaging.version import Version
from transformers import AutoConfig, PreTrainedConfig, configuration_utils

from .cache_names import CACHE_NAMES
from .config_checks import (
    UNNORMALISED,
    MoEError,
    check_balance,
    check_capacity,
    check_experts_per_token,
    check_groups,
    check_noise,
    check_structure,
    raise_moe_errors,
)
from .config_fields import MODEL_TYPE, field_names, fields_of_file, is_at_top, take_fields
from .expert_plan import plan_from_dense
from .presets import PRESETS, preset_fields
from .routing_ids import check_deciders


FORMAT_VERSION = 1
SUPPORTED_TRANSFORMERS = ("5.23.0", "6")

# Fields that transformers defines on every config and reads from whichever config a module holds.
_MIRRORED = ("output_hidden_states", "output_attentions", "return_dict", "dtype", "_attn_implementation_internal")


def check_transformers_version(version: str = transformers.__version__) -> None:
    """Raise `ImportError` when `version` of transformers is outside the supported range."""
    lowest, beyond = SUPPORTED_TRANSFORMERS
    if not Version(lowest) <= Version(version) < Version(beyond):
        raise ImportError(
            f"moe_hf works with transformers >= {lowest}, < {beyond}, and {version} is installed: "
            f"pip install 'transformers>={lowest},<{beyond}'."
        )


check_transformers_version()


@strict
class MoEConfig(PreTrainedConfig):
    r"""Configuration of [`MoEModel`] and [`MoEForCausalLM`].

    Every field of the dense configuration can be read, written and given here too (`config.hidden_size`,
    `config.vocab_size`, ...); it lives in `text_config`, which is a copy.

    Args:
        text_config (`PreTrainedConfig` or `dict`):
            Configuration of the dense decoder. Required.
        router_type (`str`, defaults to `"top_k"`):
            Name of the routing function.
        router_arch (`str`, defaults to `"linear"`):
            What computes the router logits: `"linear"`, `"mlp"`, `"cosine"` or `"attention"` over the experts.
        router_arch_kwargs (`dict`, defaults to `{}`):
            Arguments of it: `hidden_size` of `"mlp"` and `"cosine"`, `temperature` of `"cosine"`.
        routing_level (`str`, defaults to `"token"`):
            What the router reads: each `"token"`; `"prefix"`, the mean of the sequence up to it; `"sequence"`, the mean
            of all of it, which is not causal; `"task"`, an embedding of the task, from `task_ids`.
        num_tasks (`int`, defaults to 0):
            Tasks that `task_ids` tell apart, for `routing_level="task"` or `router_per_task`.
        router_per_task (`bool`, defaults to `False`):
            Whether each task has a router of its own.
        expert_groups (`dict[str, list[list[int]]]`, *optional*):
            For `"task"`, `"language"` or `"modality"` the experts that each id may use, such as
            `{"language": [[0, 1], [2, 3]]}`. The model then needs `language_ids`, (B,) or (B, S).
        expert_group_prior (`float`, *optional*):
            Added to the logits of these experts, instead of closing the others.
        num_experts (`int`, defaults to 8):
            Routed experts per MoE layer, E >= 1.
        num_experts_per_tok (`int`, defaults to 2):
            Experts that each token uses, 1 <= K <= E.
        num_experts_per_layer (`list[int]`, *optional*):
            Routed experts of each decoder layer, 0 for a layer that stays dense; `num_experts` is the largest.
        moe_intermediate_size (`int`, *optional*):
            Width F of one routed expert; the dense model's width when not given.
        expert_intermediate_sizes (`list[int]`, *optional*):
            Width of each routed expert. All are stored, and computed, at the largest: the rest of a narrower one is
            zeros, which get no gradient.
        extra_experts (`list[str]`, defaults to `[]`):
            Kinds of further experts that the router scores after the routed ones: `"zero"`, `"copy"`, `"constant"`.
        norm_topk_prob (`bool`, *optional*):
            Whether the weights of a token are divided by their sum. Defaults to K > 1, and to `False` where the
            number of a token's experts varies.
        scoring_func (`str`, defaults to `"softmax"`):
            `"softmax"` or `"sigmoid"` of the router logits.
        n_group, topk_group (`int`, *optional*):
            A token's experts come from `topk_group` of `n_group` groups of neighbouring experts.
        routed_scaling_factor (`float`, defaults to 1.0):
            Factor of the weights, after normalisation.
        num_moe_heads (`int`, defaults to 1):
            Sub-tokens of width D / heads that each token is split into and that are routed one by one.
        shared_expert_intermediate_size (`int`, defaults to 0):
            Width of the shared expert that sees each token; 0 for none.
        shared_expert_gate (`bool` or `str`, defaults to `False`):
            Whether a learned sigmoid gate scales the shared expert's output. With `"softmax"` two coefficients that
            sum to 1 weigh the routed experts' output and the shared expert's.
        output_mixture (`str`, *optional*):
            `"likelihood"`: each expert of the last layer makes a prediction of its own, and the gate mixes the
            distributions, not the experts' outputs. With `router_type="dense"`.
        moe_dense_ffn (`str`, *optional*):
            A dense layer `"before"` or `"after"` the experts of each MoE layer, as wide as the dense model's MLP. It starts
            without effect.
        first_k_dense_replace (`int`, defaults to 0):
            The first layers that stay dense.
        decoder_sparse_step (`int`, defaults to 1):
            Layer i has experts when (i + 1) is a multiple of it.
        mlp_only_layers (`list[int]`, defaults to `[]`):
            Layers that stay dense.
        balance_strategy (`str`, defaults to `"loss"`):
            What balances the load of the experts: `"loss"`, the losses below alone, or `"bias"`, also a bias per
            expert that is added to the scores for choosing only and moved after each optimizer step.
        bias_update_rate (`float`, defaults to 0.001):
            How far that bias moves in a step; 0 holds it.
        balance_loss_scope (`str`, defaults to `"micro_batch"`):
            Over which tokens the load-balancing loss is taken: `"micro_batch"`, each `"sequence"` (each document, when
            packed), or `"global_batch"`, choices counted over all processes and the micro-batches of a step.
        router_aux_loss_coef (`float`, *optional*):
            Weight of the load-balancing loss, which is 1 at perfect balance. Defaults to 0.01, and to 0 with
            `balance_strategy="bias"` and for `"segment_merge"`.
        router_z_loss_coef (`float`, defaults to 0.001):
            Weight of the router z-loss.
        router_loss_coefs (`dict[str, float]`, defaults to `{}`):
            Weights of further losses: `"importance_loss"`, `"load_loss"`, `"local_entropy_loss"`,
            `"global_entropy_loss"`, `"device_balance_loss"`, `"sparsity_loss"`, `"gate_variance_loss"`,
            `"policy_gradient_loss"`. One of weight 0 is reported with `output_router_logits`.
        router_loss_kwargs (`dict`, defaults to `{}`):
            Arguments that one of them alone reads: `load_estimator` (`"shazeer"` or `"vmoe"`),
            `global_entropy_min_experts`, `num_device_groups`, and with `extra_experts` `extra_expert_penalty`.
        router_jitter_noise (`float`, defaults to 0.0):
            In training the router's input is multiplied by uniform noise in [1 - x, 1 + x]. The experts' is not.
        router_noise (`str`, defaults to `"none"`):
            Noise added to the logits in training: `"gaussian"` with standard deviation 1 / E, `"uniform"` in [-1, 1],
            `"gumbel"`, `"learned"` (gaussian, its width from the hidden states).
        router_noise_scale (`float`, defaults to 1.0):
            Factor of `router_noise`.
        router_noise_affects (`str`, defaults to `"selection"`):
            Whether `router_noise` changes the choice of experts alone, or `"both"` choice and weights.
        capacity_factor (`float`, *optional*):
            In training an expert takes at most ceil(factor * tokens * K / E) tokens of a sequence (of a document, when
            packed). `None`: every choice is served.
        eval_capacity_factor (`float`, *optional*):
            The same in evaluation, without a cache.
        min_expert_capacity (`int`, defaults to 4):
            The least that an expert takes under a capacity factor, in tokens.
        overflow_policy (`str`, defaults to `"drop"`):
            What becomes of a choice whose expert is full: `"drop"` it, or `"reroute"` it to the next best one.
        capacity_order (`str`, defaults to `"token_major"`):
            Who gets a slot first: earlier tokens; not causal: `"choice_major"`, first choices of all tokens, or
            `"batch_prioritized"`, the same with tokens of higher scores first.
        allow_noncausal_routing (`bool`, defaults to `False`):
            Whether routing may depend on later tokens. The loss of a causal language model then means nothing.
        router_kwargs (`dict`, defaults to `{}`):
            Arguments that one routing function alone reads.
        output_router_logits (`bool`, defaults to `False`):
            Whether the model returns the router logits of each MoE layer.
        upcycling (`dict`, *optional*):
            How the weights came from a dense checkpoint; written by `moe_hf.upcycle`.
        format_version (`int`, defaults to 1):
            Version of the checkpoint's layout.

    Raises:
        MoEError: for a value outside its range, fields that exclude one another, or a name that is no field.
    """

    model_type: ClassVar[str] = MODEL_TYPE
    sub_configs_defaults: ClassVar[dict] = {
        "text_config": configuration_utils.SubConfigSpec(AutoConfig, model_type="llama", optional=True),
    }
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        *CACHE_NAMES,
        "aux_loss",
        "router_logits",
        "router_losses",
        "router_stats",
    ]

    text_config: dict | PreTrainedConfig | None = None
    router_type: str = "top_k"
    router_arch: str = "linear"
    router_arch_kwargs: dict | None = None
    routing_level: str = "token"
    num_tasks: int = 0
    router_per_task: bool = False
    expert_groups: dict | None = None
    expert_group_prior: float | int | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    num_experts_per_layer: list[int] | None = None
    moe_intermediate_size: int | None = None
    expert_intermediate_sizes: list[int] | None = None
    extra_experts: list[str] | None = None
    norm_topk_prob: bool | None = None
    scoring_func: str = "softmax"
    routed_scaling_factor: float | int = 1.0
    num_moe_heads: int = 1
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool | str = False
    output_mixture: str | None = None
    moe_dense_ffn: str | None = None
    first_k_dense_replace: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    balance_strategy: str = "loss"
    bias_update_rate: float | int = 1e-3
    balance_loss_scope: str = "micro_batch"
    router_aux_loss_coef: float | int | None = None
    router_z_loss_coef: float | int = 1e-3
    router_loss_coefs: dict | None = None
    router_loss_kwargs: dict | None = None
    n_group: int | None = None
    topk_group: int | None = None
    router_jitter_noise: float | int = 0.0
    router_noise: str = "none"
    router_noise_scale: float | int = 1.0
    router_noise_affects: str = "selection"
    capacity_factor: float | int | None = None
    eval_capacity_factor: float | int | None = None
    min_expert_capacity: int = 4
    overflow_policy: str = "drop"
    capacity_order: str = "token_major"
    allow_noncausal_routing: bool = False
    router_kwargs: dict | None = None
    output_router_logits: bool = False
    upcycling: dict | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        self.text_config, kwargs = take_fields(self.text_config, kwargs, field_names(self))
        self.mlp_only_layers = sorted(self.mlp_only_layers or [])
        self.extra_experts = list(self.extra_experts or [])
        if self.expert_intermediate_sizes and self.moe_intermediate_size is None:
            self.moe_intermediate_size = max(self.expert_intermediate_sizes)
        for name in ("router_kwargs", "router_arch_kwargs", "router_loss_coefs", "router_loss_kwargs"):
            setattr(self, name, dict(getattr(self, name) or {}))
        if self.router_aux_loss_coef is None:
            is_balanced = self.balance_strategy == "bias" or self.router_type == "segment_merge"
            self.router_aux_loss_coef = 0.0 if is_balanced else 0.01
        # transformers would take None for a choice, and undo the one that a loaded dense model made.
        kwargs.setdefault("attn_implementation", self.text_config._attn_implementation)
        super().__post_init__(**kwargs)
        if self.norm_topk_prob is None:
            self.norm_topk_prob = self.num_experts_per_tok > 1 and self.router_type not in UNNORMALISED
        for name in ("output_hidden_states", "return_dict"):
            setattr(self.text_config, name, getattr(self, name))

    def validate_routing(self):
        """Part of the strict validation: how tokens are given experts, and what the router's losses weigh."""
        check_experts_per_token(self)
        check_groups(self)
        check_noise(self)
        check_capacity(self)
        check_balance(self)
        check_deciders(self)

    def validate_structure(self):
        """Part of the strict validation: the width of the experts and which layers have them."""
        if self.format_version > FORMAT_VERSION or self.format_version < 1:
            raise MoEError(
                f"format_version is {self.format_version}, and this version of moe_hf reads 1 to {FORMAT_VERSION}: "
                "upgrade moe_hf."
            )
        check_structure(self)

    def validate_layer_type(self):
        """Part of the strict validation: `text_config` has checked its own layer types, which only its class knows."""

    @staticmethod
    def presets() -> dict[str, str]:
        """The names that `from_preset` knows, each with its source, what differs in a decoder, and values not read there."""
        return {name: preset.describe() for name, preset in PRESETS.items()}

    @classmethod
    def from_preset(cls, name: str, text_config: dict | PreTrainedConfig, **overrides) -> "MoEConfig":
        """The MoE of a paper, one of `presets()`, for a dense decoder; `overrides` of its fields win.

        Raises:
            MoEError: an unknown name, or what `MoEConfig` refuses.
        """
        text_config, overrides = take_fields(text_config, overrides, field_names(cls))
        return cls(text_config=text_config, **preset_fields(name, text_config, overrides))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers, for what a file holds; other values for its fields are checked together with the rest.

        Raises:
            MoEError: what `MoEConfig` refuses, or a name in `kwargs` that nothing knows.
        """
        hands_on = kwargs.pop("return_unused_kwargs", False)
        given, marks, options = fields_of_file(config_dict, kwargs, field_names(cls), hands_on=hands_on)
        config, unused = super().from_dict(given, return_unused_kwargs=True, **options)
        vars(config).update(marks)
        return (config, unused) if hands_on else config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> "MoEConfig":
        """As in transformers; what a file holds is taken as by `from_dict`."""
        return cls.from_dict(cls._dict_from_json_file(json_file))

    def is_moe_layer(self, layer_index: int) -> bool:
        """Whether decoder layer `layer_index` (from 0) has experts."""
        return (
            layer_index >= self.first_k_dense_replace
            and layer_index not in self.mlp_only_layers
            and (layer_index + 1) % self.decoder_sparse_step == 0
            and self.experts_of_layer(layer_index) > 0
        )

    def experts_of_layer(self, layer_index: int) -> int:
        """Routed experts that decoder layer `layer_index` (from 0) has where it is a MoE layer."""
        return self.num_experts if self.num_experts_per_layer is None else self.num_experts_per_layer[layer_index]

    def get_text_config(self, decoder=None, encoder=None) -> "MoEConfig":
        """This config itself: it answers for the dense fields, and tools look for `num_experts` and the like here."""
        return self

    @property
    def base_model_tp_plan(self) -> dict | None:
        """Tensor-parallel plan of the dense decoder; the model adds its experts'."""
        return self.text_config.base_model_tp_plan

    @property
    def base_model_pp_plan(self) -> dict | None:
        """Pipeline plan of the dense decoder."""
        return self.text_config.base_model_pp_plan

    @property
    def base_model_ep_plan(self) -> dict | None:
        """Expert-parallel plan of the blocks, where the dense decoder's tensor-parallel plan names its MLPs."""
        return None if self.router_type == "segment_merge" else plan_from_dense(self.base_model_tp_plan)

    @property
    def base_model_fsdp_plan(self) -> dict:
        """FSDP plan of the dense decoder."""
        return self.text_config.base_model_fsdp_plan

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with the dense fields at the top too, where tools look for them; `from_dict` reads it."""
        own = super().to_dict()
        return {name: value for name, value in own["text_config"].items() if is_at_top(name)} | own

    def to_diff_dict(self) -> dict[str, Any]:
        """As in transformers: what `config.json` holds, each field once."""
        own = super().to_dict()
        # Whole, not as a difference from the family's defaults, which may change between transformers versions.
        return {n: v for n, v in super().to_diff_dict().items() if n in own} | {"text_config": own["text_config"]}

    def __getattr__(self, name: str) -> Any:
        # transformers probes for optional fields while the config is being built; those belong to text_config alone, and
        # so does what it keeps under private names, such as the differences between layers.
        text_config = self.__dict__.get("text_config")
        if name.startswith("_") or "_post_init_done" not in self.__dict__ or text_config is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        try:
            return getattr(text_config, name)
        except RuntimeError as error:
            # Configs whose layers differ refuse a single answer, and hasattr() expects an AttributeError.
            raise AttributeError(str(error)) from error

    def __setattr__(self, name: str, value: Any) -> None:
        text_config = self.__dict__.get("text_config")
        if "_post_init_done" in self.__dict__ and isinstance(text_config, PreTrainedConfig):
            if name in _MIRRORED:
                # Saving leaves the name of a dtype here, and some dense classes compute with it.
                is_named = name == "dtype" and isinstance(value, str)
                setattr(text_config, name, getattr(torch, value, value) if is_named else value)
            elif not (name.startswith("_") or hasattr(type(self), name) or name in self.__dict__) and hasattr(
                text_config, name
            ):
                setattr(text_config, name, value)
                return
        super().__setattr__(name, value)


MoEConfig.__init__ = raise_moe_errors(MoEConfig.__init__)
MoEConfig.validate = raise_moe_errors(MoEConfig.validate)

__all__ = ["MoEConfig", "MoEError"]
