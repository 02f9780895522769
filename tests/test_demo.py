"""The demo: every stage runs on very little text, the results hold together, and a second run does nothing twice."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moe_hf.errors import MoEError
from moe_hf.saving import verify_manifest
from training.demo.bigram import KneserNeyBigram, neighbours
from training.demo.card import command
from training.demo.job import main
from training.demo.settings import ARMS, MOES, SHARDS, TINY, Settings, parse_arguments
from training.demo.stages import Stages
from training.demo.tables import COMPARISONS


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def results(output_dir) -> dict:
    main(["--tiny", "--seeds", "1", "--output-dir", str(output_dir)])
    return json.loads((output_dir / "results.json").read_text(encoding="utf-8"))


def test_demo_runs_every_stage_and_leaves_ordinary_checkpoints(results, output_dir):
    seed = results["seeds"][0]
    others = {"bigram", "dense", *MOES, "moe_all-reload", "moe_all-shared"}
    others |= {f"{name}-routing" for name, arm in ARMS.items() if arm.start in MOES}
    assert {"data", *(f"seed0/{name}" for name in others | ARMS.keys())} == set(results["built"])
    for name in ("dense", *MOES, *ARMS):
        assert (output_dir / "seed0" / name / "model.safetensors").is_file()
        assert (output_dir / "seed0" / name / "tokenizer.json").is_file()
        losses = seed[name]["held_out"]
        assert set(losses) == {"code", "prose", "all"}
        assert losses["all"]["tokens"] == losses["code"]["tokens"] + losses["prose"]["tokens"]
        assert losses["all"]["perplexity"] == pytest.approx(math.exp(losses["all"]["token_loss"]), rel=1e-9)
        assert 0 <= losses["all"]["accuracy"] <= 1
    assert json.loads((output_dir / "seed0/dense/config.json").read_text())["model_type"] == "llama"


def test_demo_upcycling_is_exact_and_changes_no_held_out_loss(results):
    seed = results["seeds"][0]
    for name in MOES:
        assert seed[name]["verification"]["relative_error"] <= 1e-5
        dense, moe = (seed[start]["held_out"]["all"]["token_loss"] for start in ("dense", name))
        assert moe == pytest.approx(dense, rel=1e-6)


def test_half_width_experts_cost_a_token_what_the_dense_model_costs_and_their_routers(results):
    dense, granular, moe = (results["seeds"][0][name] for name in ("dense", "granular", "moe"))
    routers = 2 * TINY["num_hidden_layers"] * TINY["hidden_size"] * SHARDS * Settings.num_experts
    assert granular["forward_flops_per_token"] - dense["forward_flops_per_token"] == routers
    assert granular["parameters"] - moe["parameters"] == routers // 2 * (SHARDS - 1) // SHARDS


def test_demo_trains_controls_on_equal_tokens_and_one_on_equal_flops(results):
    seed = results["seeds"][0]
    equal = {name: seed[name]["tokens"] for name, arm in ARMS.items() if not arm.equal_flops}
    assert len(set(equal.values())) == 1
    dense, moe = seed["dense_all_equal_flops"], seed["moe_all"]
    used, wanted = (record["tokens"] * record["forward_flops_per_token"] for record in (dense, moe))
    one_step = 4 * TINY["block_size"] * dense["forward_flops_per_token"]
    assert wanted - one_step < used <= wanted
    assert seed["moe_moe"]["trainable_parameters"] < seed["moe_all"]["trainable_parameters"] == moe["parameters"]
    for difference, (moe_arm, dense_arm) in zip(
        results["summary"]["differences"].values(), COMPARISONS.values(), strict=True
    ):
        ours, control = (seed[name]["held_out"]["all"]["token_loss"] for name in (moe_arm, dense_arm))
        assert difference["mean"] == ours - control


def test_demo_model_reloaded_in_a_fresh_process_gives_equal_logits(results):
    reload = results["seeds"][0]["moe_all-reload"]
    assert reload["class"] == "MoEForCausalLM"
    assert reload["max_abs_error"] <= 1e-6
    assert len(reload["samples"]) == 3


def test_demo_counts_each_held_out_token_once_per_expert_it_uses(results, output_dir):
    routing = json.loads((output_dir / "seed0/moe_all-routing/routing.json").read_text(encoding="utf-8"))
    tokens = results["data"]["held_out_tokens"]
    assert routing["groups"]["domain"] == ["code", "prose"] and len(routing["layers"]) == TINY["num_hidden_layers"]
    for layer in routing["layers"]:
        assert [sum(row) for row in layer["groups"]["domain"]] == [2 * tokens["code"], 2 * tokens["prose"]]


def test_demo_leaves_a_report_and_a_model_to_share_with_a_card_of_what_was_measured(results, output_dir):
    report, shared = output_dir / "seed0/moe_all-routing", output_dir / "seed0/moe_all-shared/model"
    assert "<html" in (report / "report.html").read_text(encoding="utf-8")
    assert (shared / "routing.png").read_bytes() == (report / "routing.png").read_bytes()
    assert (
        json.loads((report / "routing.json").read_text(encoding="utf-8"))["summary"]["drift from the dense origin"] > 0
    )
    weights = "model.safetensors"
    assert (shared / weights).read_bytes() == (output_dir / "seed0/moe_all" / weights).read_bytes()
    card, seed = (shared / "README.md").read_text(encoding="utf-8"), results["seeds"][0]
    ours, parent, control = (seed[name]["held_out"] for name in ("moe_all", "dense", "dense_all"))
    row = "| CPython prose, held-out documents | nats/token | {:.4f} | {:.4f} |"
    assert row.format(ours["prose"]["token_loss"], parent["prose"]["token_loss"]) in card
    assert f"| tokens | {TINY['continued_tokens']:,} |" in card and "| scope | all |" in card
    assert f"(dense, all) it has {control['all']['token_loss']:.4f} nats/token" in card
    assert "python -m training.demo --vocab-size 512 --code-characters 200000" in card
    assert str(output_dir) not in card
    verify_manifest(shared)


def test_card_names_the_command_that_makes_the_model_again(tmp_path):
    assert command(Settings(), 0) == "make demo"
    assert command(Settings(seeds=3), 0) == "make demo"
    assert command(Settings(seeds=3), 2) == "python -m training.demo --seeds 3"
    assert command(Settings(source="me/my model"), 0) == "python -m training.demo --source 'me/my model'"
    assert command(Settings(source=str(tmp_path), num_experts=4), 0) == (
        "python -m training.demo --source FOLDER --num-experts 4"
    )


def test_second_demo_run_reuses_every_stage_and_gives_the_same_results(results, output_dir):
    again = main(["--tiny", "--seeds", "1", "--output-dir", str(output_dir)])
    assert again["built"] == []
    assert again["reused"] == results["built"]
    assert json.loads(json.dumps(again["seeds"])) == results["seeds"]


def test_stage_is_done_again_when_its_settings_change_or_a_file_is_truncated(tmp_path):
    calls = []

    def build(folder: Path) -> dict:
        calls.append(folder)
        (folder / "weights").write_text("whole")
        return {"calls": len(calls)}

    def run(**settings) -> dict:
        return Stages(tmp_path / "out", say=lambda line: None).run("one", settings, build)["result"]

    assert [run(a=1), run(a=1), run(a=2)] == [{"calls": 1}, {"calls": 1}, {"calls": 2}]
    (tmp_path / "out/one/weights").write_text("who")
    assert run(a=2) == {"calls": 3}


def test_stage_that_fails_leaves_nothing(tmp_path):
    def build(folder: Path) -> dict:
        (folder / "half").write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        Stages(tmp_path / "out", say=lambda line: None).run("one", {}, build)
    assert not (tmp_path / "out").exists()


def test_bigram_probabilities_sum_to_one_after_seen_and_unseen_tokens():
    tokens = np.array([0, 1, 2, 0, 1, 3, 0, 2, 0, 1, 2, 2, 1, 0])
    model = KneserNeyBigram(tokens[:-1], tokens[1:], vocab_size=6)
    every = np.arange(6)
    for previous in every:
        assert model.probabilities(np.full(6, previous), every).sum() == pytest.approx(1, abs=1e-12)
    assert (model.probabilities(np.full(6, 5), every) > 0).all()


def test_bigram_scores_the_tokens_that_a_causal_model_is_scored_on():
    ids = np.array([[5, 6, 7], [8, 9, 10]])
    labels = np.array([[-100, 6, 7], [8, -100, 10]])
    previous, following = neighbours(ids, labels)
    assert previous.tolist() == [5, 6, 9]
    assert following.tolist() == [6, 7, 10]


def test_demo_takes_seeds_and_source_from_the_environment_and_arguments_win(monkeypatch):
    monkeypatch.setenv("SEEDS", "3")
    monkeypatch.setenv("SOURCE", "some/folder")
    settings, output_dir = parse_arguments([], "demo")
    assert settings == Settings(seeds=3, source="some/folder")
    assert output_dir == Path("demo")
    assert parse_arguments(["--seeds", "2"], "demo")[0].seeds == 2
    monkeypatch.setenv("SEEDS", "")
    monkeypatch.setenv("SOURCE", "")
    assert parse_arguments([], "demo")[0] == Settings()


@pytest.mark.parametrize("seeds", ["0", "many"])
def test_demo_refuses_a_number_of_seeds_that_is_none(monkeypatch, seeds):
    monkeypatch.setenv("SEEDS", seeds)
    with pytest.raises(MoEError, match="SEEDS"):
        parse_arguments([], "demo")
