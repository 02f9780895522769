"""`make check-real` on tiny models under the names of real ones: what it accepts, what it finds, what it needs."""

import subprocess
from pathlib import Path

import pytest
from datasets import Dataset
from typer.testing import CliRunner

from moe_hf.cli import app
from moe_hf.data import train_tokenizer
from tests import check_real
from tests.check_real import MODELS, Outcome, RealModel, main
from tests.tiny_models import tiny_dense


# Of the models in the list, in its order.
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3", "ernie4_5", "gpt_neox", "bloom", "gemma3_text")


def parameters(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, dict[str, RealModel]]:
    """A folder of tiny models under the names of the real ones, and what is true of them.

    Their files are links to files elsewhere, as in the cache of the Hub.
    """
    root = tmp_path_factory.mktemp("real")
    tokenizer = train_tokenizer(Dataset.from_dict({"text": [check_real.PROMPT] * 3}), vocab_size=257 + 8)
    models = {}
    for family, listed in zip(FAMILIES, MODELS, strict=True):
        dense = tiny_dense(family, vocab_size=len(tokenizer))
        dense.save_pretrained(root / "blobs" / family)
        tokenizer.save_pretrained(root / "blobs" / family)
        (root / listed.name).mkdir(parents=True)
        for file in (root / "blobs" / family).iterdir():
            (root / listed.name / file.name).symlink_to(file)
        models[family] = RealModel(
            listed.name, listed.dense_class, parameters(dense), target=listed.target, refusal=listed.refusal
        )
    return root, models


def in_this_process(*arguments: object) -> subprocess.CompletedProcess:
    """The command without the seconds that each new process needs to import torch."""
    words = [str(argument) for argument in arguments]
    result = CliRunner().invoke(app, words)
    return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)


def test_command_runs_in_a_process_of_its_own():
    assert "upcycle" in check_real.command("--help").stdout
    assert check_real.command("--no-such-option").returncode == 2


def test_models_are_taken_through_all_commands_and_only_what_differs_is_named(tiny, capsys, monkeypatch):
    monkeypatch.setattr(check_real, "command", in_this_process)
    root, models = tiny
    wrong = RealModel(models["gpt2"].name, "GPT2LMHeadModel", models["gpt2"].parameters + 1, refusal=MODELS[0].refusal)
    assert main(["--folder", str(root)], models=tuple((models | {"gpt2": wrong}).values())) == 1
    output = capsys.readouterr().out
    (row,) = (line for line in output.splitlines() if "SmolLM2" in line and "LlamaForCausalLM" in line)
    assert "yes" in row and "mixtral" in row
    assert f"{models['llama'].parameters:,}" in row
    assert f"none: {MODELS[0].refusal}" in " ".join(output.split())
    mistakes = " ".join(output.split("seconds")[1].split())
    assert (
        f"openai-community/gpt2: expected {{'class': 'GPT2LMHeadModel', 'parameters': {wrong.parameters}}}" in mistakes
    )
    assert mistakes.count(": expected {") == 1
    assert "7 of 8 as expected" in output


@pytest.mark.parametrize(("mistakes", "code"), [((), 0), (("x: logits differ",), 1)], ids=["none", "one"])
def test_exit_code_says_whether_all_was_as_expected(mistakes, code, tiny, monkeypatch, capsys):
    root, models = tiny
    outcome = Outcome(("x", "X", "1", "yes", "0", "mixtral"), mistakes, 1.0)
    monkeypatch.setattr(check_real, "check", lambda *_: outcome)
    assert main(["--folder", str(root)], models=(models["llama"],)) == code
    assert ("logits differ" in capsys.readouterr().out) == bool(mistakes)


def test_hub_that_cannot_be_reached_is_one_sentence(capsys):
    assert main(["--only", "Qwen/Qwen3-0.6B"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Qwen/Qwen3-0.6B cannot be downloaded, the Hub is not reachable" in line
    assert "--folder" in line


def test_missing_folder_is_named(tmp_path, capsys):
    assert main(["--folder", str(tmp_path), "--only", "openai-community/gpt2"]) == 2
    assert str(tmp_path / "openai-community/gpt2") in capsys.readouterr().err


def test_the_list_has_8_models_each_with_a_target_or_a_reason():
    assert len({model.name for model in MODELS}) == len(MODELS) == 8
    assert all((model.target is None) == bool(model.refusal) for model in MODELS)
