"""Laws of the model card: it says what is counted or given, the same each time, and leaves out what is not known."""

import re

import pytest
import yaml

from moe_hf import MoEError, inspect_model, upcycle
from moe_hf.reporting.card import hub_id, model_card
from tests.tiny_models import tiny_dense, tiny_native_moe


@pytest.fixture(scope="module")
def ours():
    fields = {"shared_expert_intermediate_size": 24, "shared_expert_gate": True, "allow_inexact": True}
    return upcycle(tiny_dense("llama"), num_experts=4, noise=0.1, mlp_only_layers=[1], **fields)


def parameters_table(model) -> dict[str, int]:
    rows = re.findall(r"^\| ([a-zA-Z ]+) \| ([\d,]+) \|$", str(model_card(model)), re.MULTILINE)
    return {name: int(count.replace(",", "")) for name, count in rows}


@pytest.mark.parametrize("family", ["ours", "mixtral", "dense"])
def test_the_parameters_are_those_that_inspection_counts(ours, family):
    model = {"ours": ours, "mixtral": tiny_native_moe("mixtral"), "dense": tiny_dense("llama")}[family]
    facts, table = inspect_model(model), parameters_table(model)
    assert table["total"] == facts.total_parameters == sum(p.numel() for p in model.parameters())
    if family == "dense":
        assert set(table) == {"total"}
    else:
        assert table["active per token"] == facts.active_parameters < table["total"]
        assert table["routed experts"] == sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)


def test_the_card_is_deterministic_and_its_metadata_is_yaml(ours):
    first, second = (str(model_card(ours, repo_id="me/tiny", has_tokenizer=True)) for _ in range(2))
    assert first == second
    metadata = yaml.safe_load(first.split("---\n")[1])
    assert metadata["tags"] == ["moe", "mixture-of-experts", "moe_hf", "upcycled"]
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"


def test_sections_without_facts_vanish(ours):
    card = str(model_card(ours))
    assert set(re.findall(r"^## (.*)$", card, re.MULTILINE)) == {
        *("Parameters", "Routing", "How it was made", "Use", "Limits", "Software")
    }
    assert "None" not in card and "license" not in card and "{{" not in card
    dense = str(model_card(tiny_dense("llama")))
    assert "## Routing" not in dense and "## How it was made" not in dense


def test_given_facts_appear(ours):
    facts = {
        "base_model": "somebody/dense",
        "license": "apache-2.0",
        "training": {"tokens": 1000},
        "evaluation": [{"data": "code", "nats/token": 1.25}, {"data": "prose", "nats/token": 2.5}],
        "commands": ["make demo"],
        "limits": ["English only."],
    }
    card = str(model_card(ours, card_facts=facts))
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("somebody/dense", "finetune")
    for text in ("| tokens | 1000 |", "| data | nats/token |\n|---|---|\n| code | 1.25 |\n| prose | 2.5 |\n"):
        assert text in card
    assert "```bash\nmake demo\n```" in card and "- English only.\n" in card and "No evaluation" not in card


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"licence": "mit"}, "Did you mean 'license'"),
        ({"evaluation": [{"a": 1}, {"b": 2}]}, "the same keys"),
        ({"evaluation": ["good"]}, "the same keys"),
        ({"training": ["tokens"]}, "a dict of name and value"),
        ({"commands": "make demo"}, "a list of texts"),
    ],
)
def test_a_fact_without_a_place_or_form_is_one_clear_error(ours, facts, message):
    with pytest.raises(MoEError, match=message):
        model_card(ours, card_facts=facts)


def test_a_folder_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo" / "dense").mkdir(parents=True)
    for source in (None, "", "LlamaForCausalLM", str(tmp_path), "./a/b", "demo/dense", "a/b/c"):
        assert hub_id(source) is None
    assert hub_id("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
