"""Laws of the model card: it says what is counted or given, the same each time, and leaves out what is not known."""

import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from typer.testing import CliRunner

from moe_hf import MoEError, inspect_model, upcycle
from moe_hf.cli import app
from moe_hf.hub import save_model
from moe_hf.reporting.card import hub_id, model_card
from moe_hf.reporting.card_facts import license_of, training_facts
from moe_hf.saving import verify_manifest
from tests.chat.samples import tokenizer_for
from tests.tiny_models import random_ids, tiny_dense, tiny_native_moe


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
    tokenizer = tokenizer_for("x")
    tokenizer.chat_template = None
    first, second = (str(model_card(ours, repo_id="me/tiny", tokenizer=tokenizer)) for _ in range(2))
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


STATE = {
    "global_step": 1200,
    "epoch": 2.0,
    "num_input_tokens_seen": 5_000_000,
    "log_history": [{"loss": 3.0, "step": 10}, {"loss": 2.5, "step": 1200}, {"train_runtime": 5400.0, "step": 1200}],
}
RESULTS = [
    {
        "dataset": "GSM8K",
        "metric": "exact match",
        "value": 0.41,
        "parent": 0.4,
        "dataset_id": "openai/gsm8k",
        "task_id": "gsm8k",
    },
    {"dataset": "My prose", "metric": "nats/token", "value": 2.5, "split": "test"},
]


def test_training_is_read_from_the_state_of_the_last_checkpoint(tmp_path):
    for step in (9, 1200):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(STATE | {"global_step": step}))
    rows = training_facts(tmp_path, hardware="1 x GPU")
    assert rows == {
        "optimizer steps": "1,200",
        "tokens": "5,000,000",
        "epochs": "2",
        "last training loss": "2.5000 nats/token",
        "wall time": "1.5 h",
        "hardware": "1 x GPU",
    }
    assert training_facts({"global_step": 3, "log_history": []}) == {"optimizer steps": "3"}
    with pytest.raises(MoEError, match="no global_step"):
        training_facts({"step": 1})
    for damaged in (
        {"epoch": "0"},
        {"num_input_tokens_seen": float("nan")},
        {"log_history": 1},
        {"log_history": [{"loss": []}]},
        {"log_history": [{"train_runtime": 10**400}]},
    ):
        with pytest.raises(MoEError, match="must be a"):
            training_facts({"global_step": 3, **damaged})
    with pytest.raises(MoEError, match="cannot be read"):
        training_facts(tmp_path / "none")


def test_results_stand_beside_the_parent_in_the_table_the_metadata_and_eval_results(ours, tmp_path):
    card = model_card(ours, repo_id="me/tiny", card_facts={"results": RESULTS})
    assert "| GSM8K | exact match | 0.4100 | 0.4000 |\n| My prose | nats/token | 2.5000 |  |" in str(card)
    assert "No evaluation" not in str(card)
    (index,) = yaml.safe_load(str(card).split("---\n")[1])["model-index"]
    assert index["name"] == "tiny"
    found = {result["dataset"]["type"]: result["metrics"][0] for result in index["results"]}
    assert found["openai/gsm8k"]["value"] == 0.41 and found["my-prose"] == {
        "type": "nats_token",
        "value": 2.5,
        "name": "nats/token",
    }
    card.save(tmp_path / "README.md")
    (entry,) = parse_eval_result_entries(yaml.safe_load((tmp_path / ".eval_results" / "moe_hf.yaml").read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 0.41)
    assert "dense parent: 0.4" in entry.notes
    assert ModelCard.load(tmp_path / "README.md").data.eval_results[0].metric_value == 0.41


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"dataset": "a", "metric": "b"}, "lacks 'value'"),
        ({"dataset": "a", "metric": "b", "value": 1, "score": 2}, "has 'score'"),
        ({"dataset": "a", "metric": "b", "value": "good"}, "must be a number"),
        ({"dataset": "a", "metric": "b", "value": 1, "task_id": "c"}, "needs both"),
        ("a", "list of dicts"),
    ],
    ids=str,
)
def test_results_without_their_form_are_refused(ours, row, message):
    with pytest.raises(MoEError, match=message):
        model_card(ours, card_facts={"results": [row]})


def test_routing_health_comes_with_its_picture_and_is_left_out_without(ours, tmp_path):
    from moe_hf import routing_statistics
    from moe_hf.reporting.report import write_report

    assert "Routing health" not in str(model_card(ours)) and not model_card(ours).companions
    (tmp_path / "report").mkdir()
    statistics = routing_statistics(ours, [{"input_ids": random_ids()}])
    write_report(statistics, tmp_path / "report")
    saved = save_model(ours, None, tmp_path / "saved", card_facts={"routing_report": tmp_path / "report"})
    text = (saved / "README.md").read_text()
    assert (saved / "routing.png").read_bytes() == (tmp_path / "report" / "routing.png").read_bytes()
    assert "](routing.png)" in text and f"| MaxVio | {statistics.summary()['MaxVio']:.4f} |" in text
    assert str(tmp_path) not in text
    verify_manifest(saved)
    with pytest.raises(MoEError, match="cannot be read"):
        model_card(ours, card_facts={"routing_report": tmp_path})


def test_the_licence_is_the_parents_where_its_card_is_on_this_machine(tmp_path):
    dense = tiny_dense("llama")
    dense.save_pretrained(tmp_path / "dense")
    ModelCard("---\nlicense: mit\n---\n# Parent\n").save(tmp_path / "dense" / "README.md")
    moe = upcycle(str(tmp_path / "dense"), num_experts=2)
    card = str(model_card(moe))
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit" and "## Licence\n\nmit, that of" in card
    own = str(model_card(moe, card_facts={"license": "apache-2.0"}))
    assert "license: apache-2.0" in own and "## Licence" not in own
    assert license_of("nobody/has-this") is None and license_of(str(tmp_path)) is None and license_of(None) is None


def test_the_revision_of_the_base_model_is_told_where_it_is_known(ours):
    commit = "0123456789abcdef0123456789abcdef01234567"
    dense = tiny_dense("llama")
    dense.config._commit_hash = commit
    moe = upcycle(dense, num_experts=2)
    assert f"| revision | {commit} |" in str(model_card(moe)) and "| revision |" not in str(model_card(ours))
    assert "| revision | v2 |" in str(model_card(ours, card_facts={"base_model_revision": "v2"}))


def test_the_command_fills_a_card_and_keeps_an_old_one(ours, tmp_path):
    ours.save_pretrained(tmp_path / "moe")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "trainer_state.json").write_text(json.dumps(STATE))
    (tmp_path / "facts.yaml").write_text(
        yaml.safe_dump({"license": "mit", "training": {"data": "prose"}, "results": RESULTS})
    )
    options = ["--run", tmp_path / "state", "--facts", tmp_path / "facts.yaml", "--repo-id", "me/tiny"]
    command = [str(part) for part in ("card", tmp_path / "moe", "--output", tmp_path / "out", *options)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    text = (tmp_path / "out" / "README.md").read_text()
    for part in ("| optimizer steps | 1,200 |", "| data | prose |", "license: mit", "# tiny", "| GSM8K |"):
        assert part in text
    assert (tmp_path / "out" / ".eval_results" / "moe_hf.yaml").is_file() and str(tmp_path) not in text
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 2 and "exists" in again.stderr and (tmp_path / "out" / "README.md").read_text() == text


@pytest.mark.parametrize(("name", "chat"), [("demo", []), ("smollm2", ["A chat"])])
def test_the_filled_cards_of_the_repository_are_whole(name, chat):
    folder = Path(__file__).resolve().parents[2] / "model_cards" / name
    text = (folder / "README.md").read_text()
    sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sections == [
        *("Parameters", "Routing", "How it was made", "Training", "Evaluation", *chat, "Routing health", "Reproduce"),
        *("Use", "Limits", "Software"),
    ]
    assert (folder / "routing.png").stat().st_size < 300_000 and "None" not in text and "nan" not in text.split()
    assert ModelCard(text).data.eval_results


def test_the_card_of_a_pretrained_model_names_what_it_was_made_from_and_its_licence():
    data = ModelCard((Path(__file__).resolve().parents[2] / "model_cards" / "smollm2" / "README.md").read_text()).data
    assert (data.base_model, data.license) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
