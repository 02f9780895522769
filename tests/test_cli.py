"""The command `moe-hf`: what it does, how soon it answers, and how it refuses."""

import json
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moe_hf.cli import app
from moe_hf.data import train_tokenizer
from tests.tiny_models import random_ids, tiny_dense


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense checkpoint with tokenizer and chat template, and the MoE that the command made from it."""
    from datasets import Dataset

    root = tmp_path_factory.mktemp("cli")
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["one two three"] * 3}), vocab_size=257 + 8)
    tokenizer.chat_template = TEMPLATE
    tiny_dense("llama", vocab_size=len(tokenizer)).save_pretrained(root / "dense")
    tokenizer.save_pretrained(root / "dense")
    result = run("upcycle", root / "dense", root / "moe", "--num-experts", 4, "--seed", 3)
    assert result.exit_code == 0, result.output
    return root / "dense", root / "moe", result.output


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(result) -> str:
    """The message of a user's mistake; checks exit code, absence of a traceback, and that it is one message."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.strip(), "no message"
    return " ".join(result.stderr.split())


def test_help_answers_within_a_second():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "moe_hf.cli", "--help"], capture_output=True, text=True)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
        assert all(command in done.stdout for command in ("upcycle", "verify", "inspect"))
    # The best of three: other tests share the machine.
    assert min(seconds) < 1


def test_version_is_the_package_version():
    import moe_hf

    assert run("--version").output.strip() == f"moe-hf {moe_hf.__version__}"


def test_upcycled_folder_gives_the_dense_logits(folders):
    dense, moe, output = folders
    ids = random_ids()
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (dense, moe)]
    with torch.no_grad():
        expected, actual = (model(ids).logits for model in models)
    assert float((actual - expected).norm() / expected.norm()) <= 1e-5
    assert models[1].config.num_experts == 4
    assert models[1].config.upcycling["seed"] == 3
    assert "relative" in output


def test_upcycle_carries_tokenizer_and_chat_template(folders):
    dense, moe, _ = folders
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (dense, moe))
    assert after.chat_template == TEMPLATE
    assert after("one two").input_ids == before("one two").input_ids


def test_upcycle_takes_any_config_field_and_dtype(folders, tmp_path):
    options = ("--set", "router_aux_loss_coef=0.05", "--set", "mlp_only_layers=[0]", "--dtype", "bfloat16")
    result = run("upcycle", folders[0], tmp_path / "out", "--num-experts", 2, *options)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["router_aux_loss_coef"] == 0.05
    assert config["mlp_only_layers"] == [0]
    assert config["dtype"] == "bfloat16"


def test_verify_reports_equal_models(folders):
    result = run("verify", folders[0], folders[1], "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["relative_error"] <= 1e-5


def test_verify_exits_with_one_for_different_models(folders, tmp_path):
    run("upcycle", folders[0], tmp_path / "noisy", "--num-experts", 2, "--noise", 0.5)
    result = run("verify", folders[0], tmp_path / "noisy")
    assert result.exit_code == 1
    assert result.stdout.startswith("different")


def test_inspect_reads_the_config_alone(folders, tmp_path):
    (tmp_path / "config.json").write_text((folders[1] / "config.json").read_text())
    result = run("inspect", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    assert facts["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert facts["num_experts"] == 4
    assert "routed experts" in run("inspect", tmp_path).stdout


def test_existing_destination_is_refused_and_untouched(folders, tmp_path):
    (tmp_path / "kept.txt").write_text("kept")
    assert "exists" in error_of(run("upcycle", folders[0], tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-experts-per-tok", 9), "num_experts_per_tok"),
        (("--num-experts-per-tok", 0), "num_experts_per_tok"),
        (("--num-experts-per-tok", 1, "--set", "norm_topk_prob=true"), "norm_topk_prob"),
        (("--num-experts-per-tok", 1), "allow_inexact"),
        (("--init", "magic"), "init"),
        (("--dtype", "float12"), "dtype"),
        (("--noise", -1), "noise"),
        (("--set", "router_aux_loss_coeff=1"), "router_aux_loss_coef"),
        (("--set", "first_k_dense_replace"), "FIELD=VALUE"),
        (("--set", "first_k_dense_replace=[1"), "first_k_dense_replace"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_wrong_options_are_one_message_and_write_nothing(folders, tmp_path, options, message):
    assert message in error_of(run("upcycle", folders[0], tmp_path / "out", *options))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["upcycle", "verify", "inspect"])
def test_missing_path_is_one_message(command, folders, tmp_path):
    rest = {"upcycle": [tmp_path / "out"], "verify": [folders[1]], "inspect": []}[command]
    assert "is not a folder" in error_of(run(command, tmp_path / "nowhere", *rest))
    assert list(tmp_path.iterdir()) == []


def test_folder_without_config_is_one_message(tmp_path):
    assert "config.json" in error_of(run("inspect", tmp_path))


def test_upcycling_a_moe_is_refused(folders, tmp_path):
    assert "already" in error_of(run("upcycle", folders[1], tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_truncated_weights_are_refused(folders, tmp_path):
    import shutil

    broken = shutil.copytree(folders[0], tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in error_of(run("upcycle", broken, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
