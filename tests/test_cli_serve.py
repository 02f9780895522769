"""`moe-hf serve` hands over to transformers' server, which then finds our class, or says in a sentence why not."""

import pytest
from transformers.cli import transformers as transformers_cli
from transformers.cli.serving import model_manager
from transformers.utils import import_utils
from typer.testing import CliRunner

from moe_hf import MoEForCausalLM, upcycle
from moe_hf.cli import app
from tests.tiny_models import tiny_dense


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    upcycle(tiny_dense("llama"), num_experts=2).save_pretrained(path)
    return path


@pytest.fixture
def handed_over(monkeypatch):
    """What transformers' command line was called with; its server's packages count as installed."""
    calls = []
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    monkeypatch.setattr(transformers_cli, "app", lambda arguments, prog_name: calls.append(arguments))
    # Undone afterwards, whoever set it.
    monkeypatch.setattr(model_manager.transformers, "MoEForCausalLM", None, raising=False)
    return calls


def test_all_options_are_the_servers(folder, handed_over):
    options = ["--continuous-batching", "--port", "8123", "--device", "cpu"]
    result = CliRunner().invoke(app, ["serve", str(folder), *options])
    assert result.exit_code == 0, result.output
    assert handed_over == [["serve", str(folder), *options]]
    assert model_manager.transformers.MoEForCausalLM is MoEForCausalLM


def test_what_is_no_model_is_refused_before_a_server_starts(tmp_path, handed_over):
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert result.exit_code == 2
    assert "has no config.json" in result.stderr
    assert not handed_over


def test_missing_packages_are_named(folder, monkeypatch):
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    result = CliRunner().invoke(app, ["serve", str(folder)])
    assert result.exit_code == 2
    assert "pip install 'transformers[serving]'" in result.stderr
