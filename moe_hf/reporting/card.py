"""The model card: what can be counted, read and measured of a model, and nothing that is not known."""

import difflib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moe_hf.errors import MoEError
from moe_hf.inspection import ModelFacts, inspect_model
from moe_hf.reporting.card_chat import REQUEST, check_chat, has_chats, shown_chat
from moe_hf.reporting.card_facts import (
    check_results,
    eval_results,
    eval_results_file,
    license_of,
    result_rows,
    routing_health,
)
from moe_hf.resources import resource_path
from moe_hf.unwrapping import unwrapped


METADATA_FACTS = ("base_model", "license", "language", "datasets", "metrics", "tags")
SECTION_FACTS = (
    *("title", "base_model_revision", "training", "results", "headline", "evaluation", "routing_report", "chat"),
    *("commands", "limits"),
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class MoECard(ModelCard):
    """A card with the files that go beside it, by their names; `save` writes them too."""

    companions: dict[str, bytes]

    def save(self, filepath: Path | str) -> None:
        """Write the card, and its companions into the card's folder."""
        super().save(filepath)
        for name, content in self.companions.items():
            path = Path(filepath).parent / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)


def model_card(
    model: PreTrainedModel,
    *,
    repo_id: str | None = None,
    card_facts: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> MoECard:
    """Write the card of a model from `model_cards/template.md`; a section without facts is left out.

    Args:
        model (`PreTrainedModel`): any causal LM; for a MoE its experts are counted.
        repo_id (`str`, *optional*): the name that the usage code loads.
        card_facts (`dict`, *optional*): what the model itself does not know. Metadata of the Hub: `base_model`,
            `license` (by default the parent's, where its card lies on this machine), `language`, `datasets`, `metrics`,
            `tags`. Text: `title`; `base_model_revision`; `training`, a dict of name and value, as [`training_facts`] gives;
            `results`, measurements beside the dense parent's, see [`check_results`], which become the Hub's `model-index` and
            `.eval_results` too, and `headline`, a sentence about them; `evaluation`, a list of rows with equal keys;
            `routing_report`, the folder of a [`write_report`], whose picture goes beside the card; `chat`, a list of turns
            (`role`, `content`), such as [`sample_chat`] gives; `commands` that made the model; `limits`, a list of sentences.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): the one that lies beside the model; the usage code loads it, and chats
            where it has a chat template.

    Returns:
        `MoECard`, a `ModelCard` of huggingface_hub. The same model and facts give the same text.

    Raises:
        `MoEError`: a fact that the card has no place for, or of the wrong form.
    """
    model = unwrapped(model)
    facts = _checked_facts(card_facts or {})
    upcycling = getattr(model.config, "upcycling", None) or {}
    counted = inspect_model(model)
    routing = _routing_rows(counted)
    base_model = facts.get("base_model") or hub_id(upcycling.get("source"))
    name = repo_id or "path/to/this/folder"
    title = facts.get("title") or (repo_id.split("/")[-1] if repo_id else type(model).__name__)
    parents_license = None if "license" in facts else license_of(upcycling.get("source"))
    results = check_results(facts.get("results", []))
    chat = check_chat(facts.get("chat", []))
    health, companions = routing_health(facts.get("routing_report"))
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_tags(model, routing, upcycling, tokenizer, facts),
        license=facts.get("license", parents_license),
        **({"model_name": title, "eval_results": eval_results(results)} if results else {}),
        **{key: facts[key] for key in ("language", "datasets", "metrics") if key in facts},
    )
    text_config = getattr(model.config, "text_config", None)
    card = MoECard.from_template(
        data,
        template_path=str(resource_path("model_cards/template.md")),
        title=title,
        base_model_name=base_model if isinstance(base_model, str) else None,
        dense_family=getattr(text_config, "model_type", None) or model.config.model_type,
        parameters=_parameter_rows(counted),
        routing=routing,
        upcycling=_upcycling_rows(upcycling, facts.get("base_model_revision")),
        training=facts.get("training"),
        results=result_rows(results),
        headline=facts.get("headline"),
        evaluation=facts.get("evaluation"),
        chat=shown_chat(chat),
        request=next((turn["content"] for turn in chat if turn["role"] == "user"), REQUEST),
        health=health,
        parents_license=parents_license,
        commands=facts.get("commands", []),
        limits=facts.get("limits", []),
        has_code=_has_code(model),
        has_tokenizer=tokenizer is not None,
        has_chats=has_chats(tokenizer),
        repo_id=name,
        memory=_gibibytes(sum(parameter.nbytes for parameter in model.parameters())),
        dtype=str(model.dtype).removeprefix("torch."),
        versions=_versions(),
    )
    card.companions = companions | eval_results_file(results)
    return card


def _tags(model, routing: dict, upcycling: dict, tokenizer, facts: dict[str, Any]) -> list[str]:
    tags = ["moe", "mixture-of-experts"] if routing else []
    tags += ["moe_hf"] if _has_code(model) else []
    tags += ["upcycled"] if upcycling else []
    tags += ["conversational"] if has_chats(tokenizer) else []
    return list(dict.fromkeys([*tags, *facts.get("tags", [])]))


def _parameter_rows(facts: ModelFacts) -> dict[str, int]:
    rows = {"total": facts.total_parameters}
    if facts.num_experts:
        rows |= {"active per token": facts.active_parameters} | facts.parameters_per_part
    return rows


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
    if not isinstance(facts.get("headline", ""), str):
        raise MoEError("card_facts['headline'] is a sentence about the results.")
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


def _routing_rows(facts: ModelFacts) -> dict[str, Any]:
    if not facts.num_experts:
        return {}
    shown = {name: value for name, value in facts.routing.items() if value not in (None, 0, 0.0)}
    layers = f"{facts.num_moe_layers} of {facts.num_layers}"
    required = {"num_experts": facts.num_experts, "num_experts_per_tok": facts.num_experts_per_tok}
    return {"layers with experts": layers, **required, **shown}


def _upcycling_rows(upcycling: dict[str, Any], revision: str | None) -> dict[str, Any]:
    if not upcycling:
        return {}
    rows = {"source": hub_id(upcycling.get("source")), "revision": revision or upcycling.get("revision")}
    rows["the source's weights were quantized"] = upcycling.get("quantized_as")
    rows["experts start as"] = (upcycling.get("init") or {}).get("name")
    rows["routers start as"] = (upcycling.get("router_init") or {}).get("name")
    rows |= {name: upcycling.get(name) for name in ("noise", "seed")}
    check = upcycling.get("verification") or {}
    if "relative_error" in check:
        tokens = f", on {check['num_tokens']} tokens" if "num_tokens" in check else ""
        rows["logits against the dense model"] = f"{check['relative_error']:.1e} relative, in float32{tokens}"
    if check.get("loss_before") is not None:
        rows["loss on text as upcycled"] = (
            f"{check['loss_after']:.3f} nats/token, the dense model {check['loss_before']:.3f} ({check['text']}, "
            f"{check['text_tokens']} tokens)"
        )
    if "surgery" in upcycling:
        rows["then"] = ", ".join(map(_surgery_text, upcycling["surgery"]))
    return {name: value for name, value in rows.items() if value is not None}


def _surgery_text(step: dict[str, Any]) -> str:
    check = step.get("verification") or {}
    if check.get("loss_before") is None:
        return step["operation"]
    return f"{step['operation']} (loss on text {check['loss_before']:.3f} before, {check['loss_after']:.3f} after)"


def _gibibytes(num_bytes: int) -> str:
    mebibytes = num_bytes / 2**20
    return f"{mebibytes / 1024:.2f} GiB" if mebibytes >= 1024 else f"{mebibytes:.2f} MiB"


def _versions() -> dict[str, str]:
    # Imported here, since moe_hf imports what imports this module.
    from moe_hf import __version__

    return {"moe_hf": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
