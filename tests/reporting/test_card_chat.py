"""The card of a chat model shows a chat and how to chat, and what its run measured is in the card without being told."""

import json
import re
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from moe_hf import MoEError, MoEForCausalLM, upcycle
from moe_hf.chat.generation import generated_answer
from moe_hf.cli import app
from moe_hf.hub import save_model
from moe_hf.reporting.card import model_card
from moe_hf.reporting.card_chat import REQUEST, sample_chat
from moe_hf.reporting.run_results import run_facts, run_folder
from tests.chat.samples import template_files, tokenizer_for
from tests.tiny_models import tiny_dense


@pytest.fixture(scope="module")
def chatting():
    """A tiny MoE and a tokenizer with SmolLM2's template."""
    tokenizer = tokenizer_for(template_files()["smollm2"].read_text("utf-8"))
    model = upcycle(tiny_dense("llama", vocab_size=len(tokenizer)), num_experts=2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def code_blocks(card) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", str(card), re.MULTILINE | re.DOTALL)


def test_the_chat_is_a_request_and_the_model_s_own_greedy_answer(chatting):
    model, tokenizer = chatting
    request, answer = sample_chat(model, tokenizer)
    assert request == {"role": "user", "content": REQUEST} and answer["role"] == "assistant"
    assert answer["content"] == generated_answer(model, tokenizer, [request], 60)
    assert len(answer["content"]) <= 60
    card = model_card(model, card_facts={"chat": [request, answer]}, tokenizer=tokenizer)
    assert (
        f"user: {REQUEST}\n\nassistant: {answer['content']}\n```" in str(card) and "conversational" in card.data.tags
    )


def test_nothing_is_made_up_where_no_chat_can_be_had(chatting):
    model, tokenizer = chatting
    silent = tokenizer_for("{{ raise_exception('Not today') }}")
    assert sample_chat(model, None) == sample_chat(model, silent) == []
    silent.chat_template = None
    assert sample_chat(model, silent) == []
    with torch.device("meta"):
        weightless = MoEForCausalLM(model.config)
    assert sample_chat(weightless, tokenizer) == []
    card = str(model_card(model, tokenizer=silent))
    assert "## A chat" not in card and "apply_chat_template" not in card and "conversational" not in card
    with pytest.raises(MoEError, match="'chat'. is a list of turns"):
        model_card(model, card_facts={"chat": ["Hello"]})


def test_markdown_and_marks_in_a_chat_stay_text(chatting):
    chat = [{"role": "user", "content": '"```\n# No heading"'}, {"role": "assistant", "content": "{{ 1 + 1 }} <b>"}]
    card = str(model_card(chatting[0], card_facts={"chat": chat}, tokenizer=chatting[1]))
    assert '````text\nuser: "```\n# No heading"\n\nassistant: {{ 1 + 1 }} <b>\n````' in card
    for block in code_blocks(card):
        compile(block, "card", "exec")


def test_the_card_of_the_command_shows_chat_and_run_and_its_code_runs(chatting, tmp_path):
    model, tokenizer = chatting
    run = tmp_path / "run"
    save_model(model, tokenizer, run / "final")
    (run / "eval_results.json").write_text(json.dumps({"eval_loss": 2.5, "eval_runtime": 3.0, "epoch": 1.0}))
    (run / "trainer_state.json").write_text(json.dumps({"global_step": 7, "log_history": []}))
    result = CliRunner().invoke(app, ["card", str(run / "final"), "--output", str(tmp_path / "card")])
    assert result.exit_code == 0, result.output
    card = (tmp_path / "card" / "README.md").read_text()
    assert "| held-out text | loss | 2.5000 |" in card and "| optimizer steps | 7 |" in card
    assert f"user: {REQUEST}" in card and "runtime" not in card
    block = next(block for block in code_blocks(card) if "apply_chat_template" in block and "import moe_hf" in block)
    code = block.replace("path/to/this/folder", str(run / "final"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr


BEFORE = {"eval_loss": 3.0, "eval_code_token_loss": 3.5}
AFTER = {"eval_loss": 2.0, "eval_code_token_loss": 2.5, "eval_runtime": 9.0, "eval_code_tokens": 1000}
CONTROL = {"eval_loss": 2.25, "eval_code_token_loss": 2.125}


@pytest.mark.parametrize("has_before", [True, False])
def test_a_comparison_stands_beside_its_control_and_what_was_before(chatting, tmp_path, has_before):
    found = {"this model": AFTER, "control": CONTROL}
    if has_before:
        found = {"this model": {"before": BEFORE, "after": AFTER}, "control": {"before": None, "after": CONTROL}}
        found |= {"headline": "No difference.", "reported_on": "the test half", "seeds": [0]}
    (tmp_path / "comparison.json").write_text(json.dumps(found))
    (tmp_path / "eval_results.json").write_text(json.dumps({"eval_loss": 9.0}))
    card = str(model_card(chatting[0], card_facts=run_facts(tmp_path)))
    if has_before:
        assert "| data | metric | this model | before training | dense control, trained alike |" in card
        assert (
            "| the test half | code token loss | 2.5000 | 3.5000 | 2.1250 |" in card and "\nNo difference.\n" in card
        )
    else:
        assert "| held-out text | loss | 2.0000 | 2.2500 |" in card
    assert "9.0" not in card and "1,000" not in card and "1000" not in card


def test_only_a_folder_of_a_run_is_looked_into(tmp_path):
    for name in ("final", "checkpoint-3", "other"):
        (tmp_path / "run" / name).mkdir(parents=True, exist_ok=True)
    (tmp_path / "run" / "eval_results.json").write_text("{}")
    assert run_folder(tmp_path / "run" / "final") == run_folder(tmp_path / "run" / "checkpoint-3") == tmp_path / "run"
    assert run_folder(tmp_path / "run" / "other") is None and run_folder("someone/model") is None
    assert run_facts(tmp_path / "run") == {}
    (tmp_path / "run" / "comparison.json").write_text("[1]")
    with pytest.raises(MoEError):
        run_facts(tmp_path / "run")
