"""The command `moe-hf`: what it does, how soon it answers, and how it refuses."""

import json
import resource
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from moe_hf.cli import app
from moe_hf.data import train_tokenizer
from moe_hf.upcycling.initialisers import INITIALISERS
from moe_hf.upcycling.router_init import ROUTER_INITS
from tests.tiny_models import random_ids, tiny_config, tiny_dense


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


def test_help_answers_before_torch_could_be_imported():
    def seconds_of(*command: str) -> tuple[float, str]:
        """Processor time, which a busy machine stretches least: the better of two."""
        seconds = []
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(seconds), done.stdout

    help_seconds, output = seconds_of("-m", "moe_hf.cli", "--help")
    assert all(command in output for command in ("upcycle", "verify", "inspect", "export", "to-dense"))
    assert 2 * help_seconds < seconds_of("-c", "import torch")[0]


def test_version_is_the_package_version_then_those_installed_and_tested():
    import moe_hf
    from moe_hf.versions import TESTED

    first, *rest = run("--version").output.splitlines()
    assert first == f"moe-hf {moe_hf.__version__}"
    assert [line.split()[0] for line in rest] == list(TESTED)
    oldest, newest = TESTED["torch"]
    assert f"torch {torch.__version__} (tested {oldest} to {newest})" in rest


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


def test_upcycle_takes_a_preset_over_which_fields_win(folders, tmp_path):
    result = run("upcycle", folders[0], tmp_path / "out", "--preset", "mixtral", "--num-experts", 2)
    assert result.exit_code == 0, result.output
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_experts"], config["router_aux_loss_coef"]) == (2, 0.002)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "router=top_p"], "no field 'router'; the nearest is 'router_type'"),
        (["--set", "num_hidden_layers=7"], "keeps the dense model's num_hidden_layers"),
        (["--set", "seed=7"], "the command has options of its own"),
        (["--preset", "swich"], "Did you mean 'switch'"),
        (["--preset", "switch"], "preset='switch' sets norm_topk_prob=False, num_experts_per_tok=1"),
    ],
)
def test_names_and_values_that_cannot_act_are_refused_by_upcycle_and_write_nothing(
    folders, tmp_path, options, message
):
    assert message in error_of(run("upcycle", folders[0], tmp_path / "out", *options))
    assert not list(tmp_path.iterdir())


def test_options_of_initialisers_are_recorded(folders, tmp_path):
    options = ("--init", "granular", "--init-set", "shards=2", "--init-set", "permute=true", "--shared-share", 0.25)
    options += (
        "--router-init",
        "zero",
        "--router-init-set",
        "noise=0.1",
        "--set",
        "shared_expert_intermediate_size=88",
    )
    result = run("upcycle", folders[0], tmp_path / "out", "--num-experts", 4, *options, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["folder"] == str(tmp_path / "out")
    recorded = printed["upcycling"]
    assert recorded["init"]["options"] == {"shards": 2, "permute": True, "ratio": 0.0}
    assert recorded["router_init"]["name"] == "zero"
    assert recorded["router_init"]["options"]["noise"] == 0.1
    assert recorded["shared_share"] == 0.25
    assert recorded["verification"]["relative_error"] <= 1e-5


def test_upcycle_and_verify_print_the_loss_before_and_after(folders, tmp_path):
    dense, moe, _ = folders
    said = run("verify", dense, moe)
    assert (
        said.exit_code == 0 and "loss on text: " in said.stdout and "the language reference of Python" in said.stdout
    )
    (tmp_path / "mine.txt").write_text("one two three " * 300)
    said = run("upcycle", dense, tmp_path / "out", "--num-experts", 2, "--data", tmp_path / "mine.txt")
    assert said.exit_code == 0 and "(mine.txt, " in said.stdout
    check = json.loads((tmp_path / "out" / "config.json").read_text())["upcycling"]["verification"]
    assert f"{check['loss_before']:.3f} before, {check['loss_after']:.3f} after" in said.stdout
    printed = json.loads(run("verify", dense, moe, "--data", tmp_path / "mine.txt", "--json").stdout)
    assert printed["loss_before"] == printed["loss_after"] == check["loss_before"]


def test_data_that_is_not_there_is_refused_before_anything_is_written(folders, tmp_path):
    missing = ("--data", tmp_path / "none.txt")
    assert "No file or folder" in error_of(run("upcycle", folders[0], tmp_path / "out", *missing))
    assert "No file or folder" in error_of(run("verify", *folders[:2], *missing))
    (tmp_path / "mine.txt").write_text("one two three " * 300)
    options = ("--data", tmp_path / "mine.txt", "--no-verify")
    assert "leaves that out" in error_of(run("upcycle", folders[0], tmp_path / "out", *options))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_ruined_model_is_a_red_line(folders, tmp_path):
    """Of a model that knows one sentence, under much noise."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folders[0]), AutoTokenizer.from_pretrained(folders[0])
    ids = torch.tensor([tokenizer("one two three " * 20)["input_ids"][:80]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "mine.txt").write_text("one two three " * 300)
    options = ("--num-experts", 4, "--data", tmp_path / "mine.txt")
    good = run("upcycle", tmp_path / "dense", tmp_path / "good", *options)
    bad = run("upcycle", tmp_path / "dense", tmp_path / "bad", *options, "--noise", 3)
    assert good.exit_code == bad.exit_code == 0, bad.output
    assert "The loss on text rose" not in good.output
    assert "WARNING: The loss on text rose from" in bad.stderr and "noise=3 hides the weights" in bad.stderr


def test_help_names_every_initialiser():
    output = run("upcycle", "--help").output
    assert all(name in output for name in (*INITIALISERS, *ROUTER_INITS))


def test_verification_can_be_left_out(folders, tmp_path):
    result = run(
        "upcycle", folders[0], tmp_path / "out", "--num-experts", 2, "--no-verify", "--max-shard-size", "300KB"
    )
    assert result.exit_code == 0, result.output
    assert "not compared" in result.stdout
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["upcycling"]["verification"] is None


@pytest.mark.parametrize("form", ["data.txt", "folder", "data.jsonl"])
def test_methods_that_look_at_data_take_text_in_every_form(form, folders, tmp_path):
    text = "one two three " * 300
    (tmp_path / "data.txt").write_text(text)
    (tmp_path / "folder" / "domain").mkdir(parents=True)
    (tmp_path / "folder" / "domain" / "a.txt").write_text(text)
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": text}) + "\n")
    options = ("--num-experts", 2, "--router-init", "kmeans")
    assert "inputs" in error_of(run("upcycle", folders[0], tmp_path / "out", *options))
    result = run("upcycle", folders[0], tmp_path / "out", *options, "--inputs", tmp_path / form)
    assert result.exit_code == 0, result.output
    recorded = json.loads((tmp_path / "out" / "config.json").read_text())["upcycling"]
    assert recorded["router_init"]["name"] == "kmeans"
    assert recorded["inputs"]["shape"][1] <= 80


def test_dry_run_prints_the_plan_and_writes_nothing(folders, tmp_path):
    result = run("upcycle", folders[0], "--dry-run", "--num-experts", 4)
    assert result.exit_code == 0, result.output
    for expected in ("parameters", "memory to train", "FLOPs per token", "mixtral", "papers/2406.06563"):
        assert expected in result.stdout
    assert "WARNING" not in result.stdout
    result = run("upcycle", folders[0], tmp_path / "out", "--dry-run", "--num-experts", 4, "--json")
    plan = json.loads(result.stdout)
    model = AutoModelForCausalLM.from_pretrained(folders[1])
    assert plan["moe"]["total_parameters"] == sum(p.numel() for p in model.parameters())
    assert list(tmp_path.iterdir()) == []


def test_dry_run_warns_when_no_native_family_fits(tmp_path):
    tiny_config("gpt2").save_pretrained(tmp_path)
    assert "WARNING: no native family" in run("upcycle", tmp_path, "--dry-run").stdout


def test_required_export_that_is_not_exact_is_refused_before_anything_is_written(folders, tmp_path):
    unknown = ("--set", "router_type=top_k", "--set", "scoring_func=sigmoid")
    message = error_of(run("upcycle", folders[0], tmp_path / "out", "--require-export", "mixtral", *unknown))
    assert "mixtral cannot hold" in message
    assert list(tmp_path.iterdir()) == []
    result = run("upcycle", folders[0], tmp_path / "out", "--num-experts", 2, "--require-export", "mixtral")
    assert result.exit_code == 0, result.output


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


def test_missing_destination_is_one_message(folders):
    assert "DST is missing" in error_of(run("upcycle", folders[0]))


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
        (("--init-set", "ratio=0.5"), "ratio"),
        (("--init", "drop", "--init-set", "ratio"), "--init-set takes"),
        (("--router-init", "magic"), "router_init"),
        (("--inputs", "nowhere.txt"), "No file or folder"),
        (("--require-export", "magic"), "no native family"),
        (("--dtype", "float32", "--no-verify"), "--dtype auto"),
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
