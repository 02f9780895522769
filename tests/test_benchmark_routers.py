"""The study of routers: each router of the package is in it, learns, and does something; its figures are right."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.router_arms import REFERENCE, router_arms, start_model
from benchmarks.routers import DEFAULTS, main
from benchmarks.routers_report import COLUMNS, difference, name_of
from benchmarks.routing_measures import calibrate, choices_that_differ, forward_flops, routers_of, weights_of
from benchmarks.study import TINY, Settings
from moe_hf import MoEConfig, upcycle
from moe_hf.errors import MoEError
from moe_hf.modeling import config_checks
from moe_hf.modeling.extra_experts import BUILT_IN_EXPERTS
from moe_hf.modeling.router_arch import ROUTER_ARCHITECTURES
from moe_hf.modeling.routers import BUILT_IN
from moe_hf.modeling.routing_ids import ROUTING_LEVELS
from moe_hf.modeling.soft_gates import ESTIMATORS
from moe_hf.modeling.token_choice import POLICIES
from tests.tiny_models import random_ids, tiny_config, tiny_dense


SETTINGS = Settings(**TINY)
ARMS = router_arms(SETTINGS)
ROUTED = [name for name, arm in ARMS.items() if arm.fields is not None]
TINY_RUN = ["--tiny", "--steps", "8"]
# What an option may be, by field, or by key of `router_kwargs`.
OPTIONS = {
    "router_type": BUILT_IN,
    "router_arch": ROUTER_ARCHITECTURES,
    "routing_level": ROUTING_LEVELS,
    "router_noise": config_checks.ROUTER_NOISES,
    "router_noise_affects": config_checks.NOISE_AFFECTS,
    "scoring_func": config_checks.SCORING_FUNCTIONS,
    "overflow_policy": config_checks.OVERFLOW_POLICIES,
    "capacity_order": config_checks.CAPACITY_ORDERS,
    "balance_strategy": config_checks.BALANCE_STRATEGIES,
    "policy": POLICIES,
    "estimator": ESTIMATORS,
}


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("routers") / "out"


@pytest.fixture(scope="module")
def results(output_dir) -> dict:
    return main([*TINY_RUN, "--seeds", "1", "--out", str(output_dir)])


@pytest.fixture(scope="module")
def configs() -> list[MoEConfig]:
    # The number of layers is another one here.
    given = [{**ARMS[name].config_fields, "num_experts_per_layer": None} for name in ROUTED]
    return [MoEConfig(text_config=tiny_config("llama"), **fields) for fields in given]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_router_and_option_of_the_package_is_in_the_study(option, configs):
    used = {getattr(config, option, None) or config.router_kwargs.get(option) for config in configs}
    if option == "estimator":
        used.add("straight_through")  # the default of the arm without one
    assert set(OPTIONS[option]) <= used


def test_every_kind_of_extra_expert_and_field_of_structure_is_in_the_study():
    fields = [arm.config_fields for arm in ARMS.values()]
    assert set(BUILT_IN_EXPERTS) <= {name for given in fields for name in given.get("extra_experts", ())}
    named = {name for given in fields for name in given}
    assert named >= {"n_group", "capacity_factor", "router_jitter_noise", "num_moe_heads", "num_experts_per_layer"}
    assert named >= {"moe_dense_ffn", "output_mixture"}
    assert named >= {"shared_expert_intermediate_size", "expert_groups", "expert_group_prior", "router_per_task"}


@pytest.mark.parametrize("name", ROUTED)
def test_router_learns_and_chooses_otherwise_than_plain_top_k(name, results):
    arm, run = ARMS[name], results["arms"][name]["runs"][0]
    assert run["router_change"]["not_moved"] == []
    assert run["router_change"]["relative"] > 1e-4
    differs = run["differs"]
    if arm.changes == "choice":
        assert differs["rule"] > 0 or differs["trained"] > 0
    elif arm.changes == "experts":
        assert differs["trained"] is None
        plain = results["arms"][REFERENCE]["runs"][0]
        assert run["parameters"] != plain["parameters"]
    elif arm.new_experts:
        assert differs == {"rule": 0.0, "trained": None}
    else:
        assert differs == {"rule": 0.0, "trained": 0.0}


@pytest.mark.parametrize("name", ROUTED)
def test_router_conserves_what_it_counts(name, results):
    arm, routing = ARMS[name], results["arms"][name]["runs"][0]["routing"]
    asked = arm.config_fields["num_experts_per_tok"]
    if arm.fields.get("capacity_factor"):
        kept = routing["experts_per_token"]
        assert kept == pytest.approx(asked * (1 - routing["dropped_share"]), abs=1e-5)
        assert routing["dropped_share"] > 0
    else:
        assert routing["dropped_share"] == 0
    assert 0 <= routing["unserved_share"] < 1
    assert routing["load_cv"] >= 0 and routing["max_violation"] >= 0


@pytest.mark.parametrize("name", sorted(set(ARMS) - {"dense_model"}))
def test_active_arithmetic_is_that_of_plain_top_k_at_full_size(name):
    # With as many experts per token as the configuration says, or, where that varies, is about.
    arm = router_arms(DEFAULTS)[name]
    dense = tiny_dense(
        "llama",
        hidden_size=DEFAULTS.hidden_size,
        intermediate_size=DEFAULTS.intermediate_size,
        num_hidden_layers=DEFAULTS.num_hidden_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
    )
    plain = forward_flops(start_model(ARMS[REFERENCE], dense, 0), 128, 2.0)
    fields = arm.config_fields
    experts = fields["num_experts_per_tok"] * fields.get("num_moe_heads", 1)
    if name == "segment_merge":
        experts = 2  # one, and its merging
    ours = forward_flops(start_model(arm, dense, 0), 128, experts)
    # The one row that says what half of the experts cost.
    assert ours == pytest.approx(plain * (0.65 if name == "switch_narrow" else 1), rel=0.03)


def test_arms_start_near_the_dense_model_even_where_weights_do_not_sum_to_one(results):
    start = {name: results["arms"][name]["runs"][0]["points"][0]["loss"]["all"] for name in ARMS}
    exact = [n for n in ROUTED if not (ARMS[n].added or ARMS[n].new_experts)]
    exact = [n for n in exact if results["arms"][n]["runs"][0]["weight_sums_at_start"] == pytest.approx([1.0])]
    assert len(exact) > 20
    assert all(start[name] == pytest.approx(start["dense_model"], abs=1e-5) for name in exact)
    # New neurons write nothing at first: beside the weights, wider experts compute what they did.
    assert start["switch"] == pytest.approx(start["dense_model"], abs=0.02)


def test_calibration_divides_by_the_mean_weight_sum_and_leaves_sums_of_one_alone():
    dense, batch = tiny_dense("llama"), {"input_ids": random_ids(4, 16)}
    plain = upcycle(dense, num_experts=4)
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    assert calibrate(plain, batch) == pytest.approx([1.0] * 3)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    scaled = upcycle(dense, num_experts=4, num_experts_per_tok=1, allow_inexact=True)
    before = [layer.mlp.experts.down_proj.clone() for layer in scaled.model.layers]
    sums = calibrate(scaled, batch)
    assert all(0.25 < total < 1 for total in sums)
    divided = scaled.config.upcycling["expected_weight"]
    for layer, old, total, given in zip(scaled.model.layers, before, sums, divided, strict=True):
        assert torch.allclose(layer.mlp.experts.down_proj * total, old * given)


def test_differences_between_choices_are_shares_of_what_either_chooses():
    dense, ids = tiny_dense("llama"), {"input_ids": random_ids(4, 16)}
    plain = upcycle(dense, num_experts=8, seed=0)
    assert choices_that_differ(plain, plain, [ids]) == {"rule": 0.0, "trained": 0.0}
    # One of the two choices is made by both, of two that either makes.
    one = upcycle(dense, num_experts=8, num_experts_per_tok=1, seed=0, allow_inexact=True)
    assert choices_that_differ(one, None, [ids]) == {"rule": 0.5, "trained": None}
    other = upcycle(dense, num_experts=8, seed=1)
    found = choices_that_differ(other, plain, [ids])
    assert found["rule"] == 0 and found["trained"] > 0.5


def test_weights_of_a_router_add_up_whatever_form_they_come_in():
    logits = torch.zeros(3, 4)
    index, weights = torch.tensor([[0, 1], [2, 3], [1, 1]]), torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.7, 0.0]])
    dense = weights_of((logits, weights, index))
    assert dense.tolist() == [
        pytest.approx([0.5, 0.5, 0, 0]),
        pytest.approx([0, 0, 0.9, 0.1]),
        pytest.approx([0, 0.7, 0, 0]),
    ]
    rows = weights_of((logits, weights.view(-1, 1), index.view(-1, 1), torch.tensor([0, 0, 1, 1, 2, 2])))
    assert torch.equal(rows, dense)


def test_study_writes_one_row_per_router_and_a_picture(results, output_dir):
    text = (output_dir / "table.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(ARMS)
    assert all(len(row.split("|")) == 3 + len(COLUMNS) for row in rows)
    titles = [name_of(arm) for arm in results["arms"].values()]
    assert len(set(titles)) == len(titles)
    flagged = {name for name, arm in results["arms"].items() if "(not causal)" in name_of(arm)}
    assert flagged == {"expert_choice", "sequence", "choice_major", "batch_prioritized"}
    assert (output_dir / "routers.png").read_bytes()[:4] == b"\x89PNG"
    written = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
    assert written["arms"] == results["arms"] and str(output_dir) not in json.dumps(written)


def test_second_run_does_only_what_is_missing_and_adds_plain_top_k(results, output_dir):
    again = main([*TINY_RUN, "--seeds", "1", "--arms", "switch,top_p", "--out", str(output_dir)])
    assert again["built"] == [] and list(again["arms"]) == [REFERENCE, "switch", "top_p"]
    assert again["arms"]["switch"]["runs"] == results["arms"]["switch"]["runs"]
    more = main([*TINY_RUN, "--seeds", "2", "--arms", "jitter", "--out", str(output_dir)])
    assert more["built"] == ["seed1/parent", f"seed1/{REFERENCE}", "seed1/jitter"]
    found = difference(more["arms"]["jitter"], more["arms"][REFERENCE])["per_seed"]
    last = [[run["points"][-1]["loss"]["all"] for run in more["arms"][n]["runs"]] for n in ("jitter", REFERENCE)]
    assert found == [a - b for a, b in zip(*last, strict=True)]


def test_saved_reference_is_the_trained_one(results, output_dir):
    model = AutoModelForCausalLM.from_pretrained(output_dir / "seed0" / REFERENCE / "model")
    assert len(routers_of(model)) == TINY["num_hidden_layers"]


def test_sizes_can_be_given_and_unknown_routers_are_refused(results, output_dir, tmp_path):
    shutil.copytree(output_dir / "data", tmp_path / "data")
    given = ["--tiny", "--seeds", "1", "--out", str(tmp_path), "--arms", "multi_head"]
    results = main([*given, "--hidden-size", "24", "--intermediate-size", "48", "--layers", "2", "--batch-size", "1"])
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "batch_size": 1}
    assert sizes.items() <= results["settings"].items()
    with pytest.raises(MoEError, match="swich"):
        main(["--tiny", "--arms", "swich", "--out", str(tmp_path)])
