"""The first model card of a model: what can be counted and read from it, and nothing that is not known."""

import difflib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedModel

from moe_hf.errors import MoEError
from moe_hf.resources import resource_path


METADATA_FACTS = ("base_model", "license", "language", "datasets", "metrics", "tags")
SECTION_FACTS = ("title", "training", "evaluation", "commands", "limits")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_ROUTING_FIELDS = (
    "router_type",
    "moe_intermediate_size",
    "scoring_func",
    "norm_topk_prob",
    "routed_scaling_factor",
    "shared_expert_intermediate_size",
    "router_aux_loss_coef",
    "router_z_loss_coef",
)


def model_card(
    model: PreTrainedModel,
    *,
    repo_id: str | None = None,
    card_facts: dict[str, Any] | None = None,
    has_tokenizer: bool = False,
) -> ModelCard:
    """Write the card of a model from `model_cards/template.md`; a section without facts is left out.

    Args:
        model (`PreTrainedModel`): any causal LM; for a MoE its experts are counted.
        repo_id (`str`, *optional*): the name that the usage code loads.
        card_facts (`dict`, *optional*): what the model itself does not know. Metadata of the Hub: `base_model`,
            `license`, `language`, `datasets`, `metrics`, `tags`. Text: `title`; `training`, a dict of name and value;
            `evaluation`, a list of rows with equal keys; `commands` that made the model; `limits`, a list of sentences.
        has_tokenizer (`bool`, *optional*, defaults to `False`): whether the usage code may load a tokenizer.

    Returns:
        `ModelCard`, deterministic: the same model and facts give the same text.

    Raises:
        `MoEError`: a fact that the card has no place for, or of the wrong form.
    """
    facts = _checked_facts(card_facts or {})
    upcycling = getattr(model.config, "upcycling", None) or {}
    routing = _routing(model)
    base_model = facts.get("base_model") or hub_id(upcycling.get("source"))
    name = repo_id or "path/to/this/folder"
    tags = ["moe", "mixture-of-experts"] if routing else []
    tags += ["moe_hf"] if _has_code(model) else []
    tags += ["upcycled"] if upcycling else []
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys([*tags, *facts.get("tags", [])])),
        **{key: facts[key] for key in ("license", "language", "datasets", "metrics") if key in facts},
    )
    text_config = getattr(model.config, "text_config", None)
    return ModelCard.from_template(
        data,
        template_path=str(resource_path("model_cards/template.md")),
        title=facts.get("title") or (repo_id.split("/")[-1] if repo_id else type(model).__name__),
        base_model_name=base_model if isinstance(base_model, str) else None,
        dense_family=getattr(text_config, "model_type", None) or model.config.model_type,
        parameters=parameter_counts(model),
        routing=routing,
        upcycling=_upcycling_rows(upcycling),
        training=facts.get("training"),
        evaluation=facts.get("evaluation"),
        commands=facts.get("commands", []),
        limits=facts.get("limits", []),
        has_code=_has_code(model),
        has_tokenizer=has_tokenizer,
        repo_id=name,
        memory=_gibibytes(sum(parameter.nbytes for parameter in model.parameters())),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=_versions(),
    )


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Count the parameters of a model by part; tied weights count once.

    Args:
        model (`nn.Module`): ours, a native MoE of transformers, or a dense model. A MoE module is one with a child
            `experts` that holds 3-D parameters, `(E, ..., ...)`; K is read from the config.

    Returns:
        `dict` of name and number of parameters: `total`; for a MoE also `active per token` (K of E routed experts and
        everything else, embeddings included), `routed experts`, `shared experts`, `routers` and `everything else`.
        A part without parameters is left out.
    """
    total = sum(parameter.numel() for parameter in model.parameters())
    parts = {"routed experts": 0, "shared experts": 0, "routers": 0}
    active = total
    for block in moe_blocks(model):
        routed = sum(parameter.numel() for parameter in block.experts.parameters())
        num_experts = next(parameter.shape[0] for parameter in block.experts.parameters() if parameter.ndim >= 3)
        parts["routed experts"] += routed
        active -= routed - routed * min(_experts_per_token(model), num_experts) // num_experts
        for name, child in block.named_children():
            if name.startswith("shared_expert"):
                parts["shared experts"] += sum(parameter.numel() for parameter in child.parameters())
            elif name in ("gate", "router"):
                parts["routers"] += sum(parameter.numel() for parameter in child.parameters())
    if not parts["routed experts"]:
        return {"total": total}
    counts = {"total": total, "active per token": active, **parts, "everything else": total - sum(parts.values())}
    return {name: count for name, count in counts.items() if count}


def moe_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that have experts: those with a child `experts` with 3-D parameters."""
    blocks = []
    for module in model.modules():
        experts = module._modules.get("experts")
        if experts is not None and any(parameter.ndim >= 3 for parameter in experts.parameters(recurse=False)):
            blocks.append(module)
    return blocks


def _experts_per_token(model: nn.Module) -> int:
    config = model.config.get_text_config()
    for name in ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    raise MoEError(
        f"{type(config).__name__} does not say how many experts a token uses: num_experts_per_tok was not found."
    )


def _checked_facts(facts: dict[str, Any]) -> dict[str, Any]:
    known = METADATA_FACTS + SECTION_FACTS
    for name in facts:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise MoEError(f"The card has no place for {name!r}; it knows {', '.join(known)}.{hint}")
    rows = facts.get("evaluation")
    if rows and not all(isinstance(row, dict) and row.keys() == rows[0].keys() for row in rows):
        raise MoEError("card_facts['evaluation'] is a list of dicts that all have the same keys, the table's columns.")
    if not isinstance(facts.get("training", {}), dict):
        raise MoEError("card_facts['training'] is a dict of name and value, one row of the table each.")
    for name in ("commands", "limits", "tags"):
        if isinstance(facts.get(name), str):
            raise MoEError(f"card_facts[{name!r}] is a list of texts, not one text.")
    return facts


def hub_id(source: str | None) -> str | None:
    """The source if it can be a Hub id, else None: a folder of somebody's machine says nothing to others."""
    if source and _HUB_ID.fullmatch(source) and not Path(source).exists():
        return source
    return None


def _has_code(model: PreTrainedModel) -> bool:
    return model.config.model_type == "moe_hf"


def _routing(model: PreTrainedModel) -> dict[str, Any]:
    blocks = moe_blocks(model)
    if not blocks:
        return {}
    config = model.config.get_text_config()
    values = {name: getattr(config, name, None) for name in _ROUTING_FIELDS}
    first = next(parameter for parameter in blocks[0].experts.parameters() if parameter.ndim >= 3)
    shown = {name: value for name, value in values.items() if value not in (None, 0, 0.0)}
    required = {"num_experts": first.shape[0], "num_experts_per_tok": _experts_per_token(model)}
    return {"layers with experts": f"{len(blocks)} of {config.num_hidden_layers}", **required, **shown}


def _upcycling_rows(upcycling: dict[str, Any]) -> dict[str, Any]:
    if not upcycling:
        return {}
    rows = {"source": hub_id(upcycling.get("source")), "experts start as": upcycling.get("method")}
    rows |= {name: upcycling.get(name) for name in ("noise", "seed")}
    check = upcycling.get("verification") or {}
    if "relative_error" in check:
        tokens = f", on {check['num_tokens']} tokens" if "num_tokens" in check else ""
        rows["logits against the dense model"] = f"{check['relative_error']:.1e} relative, in float32{tokens}"
    return {name: value for name, value in rows.items() if value is not None}


def _gibibytes(num_bytes: int) -> str:
    mebibytes = num_bytes / 2**20
    return f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.2f} MiB"


def _versions() -> dict[str, str]:
    # Imported here, since moe_hf imports what imports this module.
    from moe_hf import __version__

    return {"moe_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
