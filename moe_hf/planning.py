"""What an upcycling would give and cost, before a weight is read: sizes, memory, arithmetic, where the result can go.

Letters: E experts, K experts per token.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from moe_hf.dense_sources import read_dense_config
from moe_hf.errors import MoEError
from moe_hf.finetuning import scope_parameter_names
from moe_hf.inspection import ModelFacts, inspect_model
from moe_hf.interchange import exact_targets
from moe_hf.unwrapping import path_of
from moe_hf.upcycling.initialisers import Initialiser
from moe_hf.upcycling.prepare import prepare
from moe_hf.upcycling.router_init import RouterInit
from moe_hf.upcycling.sources import check_dense_config, check_dense_model
from moe_hf.weight_files import CheckpointReader


# Of a trained parameter in float32: the weight, its gradient and AdamW's two moments.
TRAINING_BYTES = 4 + 4 + 4 + 4
TRAINED_SCOPES = ("moe", "all")
# What others found about the cost of training an upcycled model, each with its address.
FINDINGS = (
    (
        "Skywork-MoE's rule of thumb: when the budget to train the MoE is twice what the dense model's training cost, or "
        "more, train the MoE from scratch; when it is much less, upcycle.",
        "https://huggingface.co/papers/2406.06563",
    ),
    (
        "Scaling laws for upcycling: the more tokens the dense model was trained on, the less each further token brings to "
        "the upcycled one, which limits upcycling where the budget is large.",
        "https://huggingface.co/papers/2502.03009",
    ),
    (
        "Drop-Upcycling: plain copies start ahead and learn more slowly than a MoE from scratch; drawing half of each "
        "expert anew made up for that over hundreds of billions of tokens.",
        "https://huggingface.co/papers/2502.19261",
    ),
)

INSTEAD = "save the model with save_pretrained first"


@dataclass(frozen=True)
class UpcyclingPlan:
    """What `upcycle` with the same arguments would make.

    Attributes:
        source: the dense model.
        method: how the experts and routers start, as in the metadata.
        dtype: of the weights.
        dense, moe: parameters, memory and arithmetic of both models.
        dense_bytes, moe_bytes: of all weights, on disk and in memory to run; no cache and no activations.
        training_bytes: memory for the weights of a training run by scope: 16 bytes per trained parameter (float32 weight,
            gradient, two moments of AdamW), the frozen rest as stored; no activations.
        why_inexact: why the logits will differ from the dense model's, or None when they will be equal.
        targets: native families of transformers to why they cannot hold the MoE exactly, or to None where they can.
    """

    source: str
    method: dict[str, Any]
    dtype: str
    dense: ModelFacts
    moe: ModelFacts
    dense_bytes: int
    moe_bytes: int
    training_bytes: dict[str, int]
    why_inexact: str | None
    targets: dict[str, str | None]

    @property
    def exact_targets(self) -> list[str]:
        """The native families that can hold the MoE exactly."""
        return [target for target, reason in self.targets.items() if reason is None]

    @property
    def relative_cost(self) -> float:
        """Arithmetic of the MoE per token over the dense model's."""
        return self.moe.flops_per_token / self.dense.flops_per_token

    def require_export(self, target: str) -> None:
        """Refuse a plan whose result the native family `target` cannot hold exactly; `"auto"` is any family.

        Raises:
            MoEError: with the reason, and the families that can.
        """
        can = f"Families that can: {', '.join(self.exact_targets) or 'none'}."
        if target == "auto":
            if not self.exact_targets:
                raise MoEError("No native family of transformers can hold this MoE exactly; --dry-run says why.")
        elif target not in self.targets:
            raise MoEError(f"There is no native family {target!r}; it must be auto or one of {list(self.targets)}.")
        elif self.targets[target] is not None:
            raise MoEError(f"{target} cannot hold this MoE exactly: {self.targets[target]}. {can}")

    def advice(self) -> list[str]:
        """What is known about the cost of training such a model, with its sources."""
        tokens = 2 / self.relative_cost
        own = (
            f"A token costs {self.relative_cost:.2f} times what it costs the dense model. Twice the dense model's training "
            f"cost is reached at {tokens:.2f} times the tokens that the dense model was trained on."
        )
        return [own, *(f"{finding} {address}" for finding, address in FINDINGS)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"relative_cost": self.relative_cost, "advice": self.advice()}


def plan_upcycling(
    source: str | os.PathLike,
    *,
    num_experts: int | None = None,
    num_experts_per_tok: int | None = None,
    preset: str | None = None,
    init: str | Initialiser = "copy",
    router_init: str | RouterInit = "normal",
    noise: float = 0.0,
    shared_share: float = 0.5,
    seed: int = 0,
    **config_fields,
) -> UpcyclingPlan:
    """Say what upcycling `source` with these arguments would make; reads its config, and the heads of its files at most.

    Args:
        source (`str` or `os.PathLike`): a folder with a config.json, a GGUF file, or a Hub id, of a dense model.
        num_experts, num_experts_per_tok, preset, init, router_init, noise, shared_share, seed, config_fields: as of `upcycle`.

    Raises:
        MoEError: for what `upcycle` would refuse without looking at the weights.
    """
    ready = prepare(
        source,
        lambda given: (str(path_of(given, INSTEAD)), dense_on_meta(str(given))),
        num_experts=num_experts,
        num_experts_per_tok=num_experts_per_tok,
        preset=preset,
        init=init,
        router_init=router_init,
        noise=noise,
        shared_share=shared_share,
        seed=seed,
        allow_inexact=True,  # the plan says it
        config_fields=config_fields,
    )
    method, config, dense, moe = ready.method, ready.config, ready.models[0], ready.moe
    moe.tie_weights()
    reason = method.why_inexact(config, ready.sites[0], dense.dtype)
    if not method.exact:
        reason = f"init={method.init.name!r} with noise={noise} changes the experts by design"
    return UpcyclingPlan(
        source=str(source),
        method=method.to_dict(),
        dtype=str(dense.dtype).removeprefix("torch."),
        dense=inspect_model(dense),
        moe=inspect_model(moe),
        dense_bytes=_weight_bytes(dense),
        moe_bytes=_weight_bytes(moe),
        training_bytes={scope: _training_bytes(moe, scope_parameter_names(moe, scope)) for scope in TRAINED_SCOPES},
        why_inexact=reason,
        targets=exact_targets(moe.config),
    )


def dense_on_meta(source: str) -> PreTrainedModel:
    """The dense model without numbers, in the dtype that it would be loaded in."""
    config = read_dense_config(source)
    check_dense_config(config, source)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=_dtype(source, config))
    check_dense_model(model, source)
    model.tie_weights()
    model.name_or_path = source
    return model


def _dtype(source: str, config: PreTrainedConfig) -> torch.dtype:
    folder = Path(source).expanduser()
    if config.dtype is None and any(folder.glob("*.safetensors")):
        with CheckpointReader(folder) as reader:
            floating = (spec.dtype for spec in reader.tensors.values() if spec.dtype.is_floating_point)
            return next(floating, torch.float32)
    return config.dtype or torch.float32


def _weight_bytes(model: PreTrainedModel) -> int:
    """Of all weights; tied ones count once."""
    stored = set(model.state_dict())
    buffers = [tensor for name, tensor in model.named_buffers() if name in stored]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*model.parameters(), *buffers])


def _training_bytes(model: PreTrainedModel, trained: Sequence[str]) -> int:
    names = set(trained)
    return sum(
        parameter.numel() * (TRAINING_BYTES if name in names else parameter.element_size())
        for name, parameter in model.named_parameters()
    )
