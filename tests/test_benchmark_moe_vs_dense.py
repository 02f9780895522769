"""The study of MoEs from scratch: arms have the sizes that they are compared at, and costs at equal loss are right."""

import json
import math
import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.intervals import paired, ratio_spread, spread
from benchmarks.moe_vs_dense import TINY, Settings, main
from benchmarks.moe_vs_dense_report import comparison, cost_to_reach, falling, loss_at
from benchmarks.runs import Pace, even_points, prepare_optimizer
from moe_hf.errors import MoEError


ARGUMENTS = ["--tiny", "--seeds", "2", "--experts", "4,2"]


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("moe_vs_dense") / "out"


@pytest.fixture(scope="module")
def results(output_dir) -> dict:
    return main([*ARGUMENTS, "--out", str(output_dir)])


def last(results: dict, arm: str, seed: int = 0) -> dict:
    return results["arms"][arm]["runs"][seed]["points"][-1]


def test_moe_has_the_active_arithmetic_of_the_dense_model_and_its_router(results):
    arms = results["arms"]
    layers, width = TINY["num_hidden_layers"], TINY["hidden_size"]
    for experts in (2, 4):
        router = 2 * layers * experts * width
        extra = arms[f"moe_{experts}"]["forward_flops_per_token"] - arms["dense"]["forward_flops_per_token"]
        assert extra == router


def test_wide_dense_model_has_the_parameters_of_the_moe_to_half_a_unit_of_width(results):
    arms = results["arms"]
    unit = 3 * TINY["hidden_size"] * TINY["num_hidden_layers"]
    for experts in (2, 4):
        moe, wide = arms[f"moe_{experts}"]["parameters"], arms[f"wide_{experts}"]["parameters"]
        assert abs(moe - wide) <= unit / 2
        assert moe > arms["dense"]["parameters"]


def test_arms_stop_at_equal_tokens_or_at_their_budget_of_flops(results):
    tokens = TINY["steps"] * TINY["batch_size"] * TINY["block_size"]
    assert last(results, "moe_4")["tokens"] == last(results, "moe_2")["tokens"] == tokens
    assert last(results, "dense")["tokens"] == Settings.dense_length * tokens
    target = tokens * results["arms"]["dense"]["training_flops_per_token"]
    for arm in ("wide_2", "wide_4"):
        one_step = last(results, arm)["training_flops"] / last(results, arm)["step"]
        assert last(results, arm)["training_flops"] <= Settings.wide_budget * target + one_step
        assert last(results, arm)["training_flops"] >= target or last(results, arm)["tokens"] == tokens


def test_learning_rate_of_a_kind_is_the_one_with_the_best_validation_loss(results):
    for kind, rate in results["rates"].items():
        assert rate["validation"][str(rate["chosen"])] == min(rate["validation"].values()), kind
        assert [float(name) for name in rate["validation"]] == list(TINY["learning_rates"])


def test_second_run_does_only_what_is_missing_and_writes_the_same(results, output_dir):
    shutil.rmtree(output_dir / "seed1/moe_4")
    again = main([*ARGUMENTS, "--out", str(output_dir)])
    assert again["built"] == ["seed1/moe_4"]
    losses = [[point["loss"] for point in r["arms"]["moe_4"]["runs"][1]["points"]] for r in (again, results)]
    assert losses[0] == losses[1]
    assert json.loads((output_dir / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(again))
    assert (output_dir / "curves.png").read_bytes()[:4] == b"\x89PNG"
    table = (output_dir / "table.md").read_text(encoding="utf-8")
    for experts in (2, 4):
        assert table.count(f"| {experts} | dense, equal") == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--experts", "2,many"], "many"),
        (["--experts", "1"], "each at least 2"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--hidden-size", "0"], "--hidden-size is 0"),
    ],
    ids=["words", "one expert", "seeds", "size"],
)
def test_study_refuses_what_it_cannot_do(arguments, message, tmp_path):
    with pytest.raises(MoEError, match=message):
        main(["--tiny", *arguments, "--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_falling_curve_is_the_nearest_that_never_rises():
    losses = np.array([5.0, 3.0, 4.0, 2.0, 2.5, 2.4, 1.0])
    found = falling(losses)
    assert np.allclose(found, [5.0, 3.5, 3.5, 2.3, 2.3, 2.3, 1.0])
    assert all(a >= b for a, b in pairwise(found))
    generator = np.random.default_rng(0)
    for _ in range(100):  # no other falling sequence is nearer
        other = np.sort(found + generator.normal(scale=0.3, size=7))[::-1]
        assert ((other - losses) ** 2).sum() >= ((found - losses) ** 2).sum()
    assert np.array_equal(falling(np.array([3.0, 2.0, 1.0])), [3.0, 2.0, 1.0])


def test_cost_and_loss_of_a_curve_are_read_between_its_points_on_a_logarithmic_line():
    costs = np.array([1.0, 10.0, 100.0])
    curve = (costs, 4 - np.log10(costs))
    assert loss_at(curve, 10**0.5) == pytest.approx(3.5)
    assert cost_to_reach(curve, 2.25) == pytest.approx(10**1.75)
    for cost, loss in zip(*curve, strict=True):
        assert cost_to_reach(curve, loss) == cost
        assert loss_at(curve, cost) == pytest.approx(loss)


def test_nothing_is_read_beyond_the_ends_of_a_curve():
    curve = (np.array([1.0, 10.0]), np.array([4.0, 3.0]))
    assert loss_at(curve, 0.5) is None
    assert loss_at(curve, 10.1) is None
    assert cost_to_reach(curve, 2.9) is None
    assert cost_to_reach(curve, 4.1) is None


def test_curve_that_learns_the_same_at_half_the_cost_has_a_share_of_one_half():
    costs = np.geomspace(1, 64, 13)
    slow = [(costs, offset - np.log(costs)) for offset in (9.0, 8.0, 8.5)]
    fast = [(costs, offset - np.log(2 * costs)) for offset in (9.0, 8.0, 8.5)]
    found = comparison(fast, slow, [16.0] * 3)
    assert found["difference"]["mean"] == pytest.approx(-math.log(2))
    assert found["share"]["per_seed"] == pytest.approx([0.5] * 3)
    assert (found["share"]["low"], found["share"]["high"]) == pytest.approx((0.5, 0.5))
    assert found["their_share"]["mean"] == pytest.approx(2)
    assert found["reached"] == 3


def test_loss_that_one_seed_does_not_reach_gives_no_mean_and_is_counted():
    costs = np.geomspace(1, 16, 9)
    theirs = [(costs, 9 - np.log(costs))] * 2
    ours = [(costs, 8.5 - np.log(costs)), (costs, 9.5 - np.log(costs))]
    found = comparison(ours, theirs, [16.0] * 2)
    assert found["share"] is None
    assert found["reached"] == 1
    assert comparison(ours, theirs, [32.0] * 2)["difference"] is None


def test_interval_of_ratios_is_that_of_their_logarithms():
    found = ratio_spread([0.5, 1.0, 2.0])
    half = spread([-math.log(2), 0.0, math.log(2)])["interval_95"]
    assert found["mean"] == pytest.approx(1)
    assert found["high"] == pytest.approx(math.exp(half))
    assert found["low"] == pytest.approx(math.exp(-half))


def test_interval_of_paired_differences_ignores_what_seeds_share():
    base = [1.0, 5.0, 9.0]
    assert paired([b + 0.5 for b in base], base)["interval_95"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("decays", [True, False])
def test_pace_warms_up_and_then_stays_or_falls_to_a_tenth(decays):
    model = nn.Linear(3, 2)
    optimizer, schedule = prepare_optimizer(model, Pace(0.1, 4, 0.5, decays), 20)
    rates = []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0, 0.025, 0.05, 0.075, 0.1])
    assert schedule.get_last_lr()[0] == pytest.approx(0.01 if decays else 0.1)
    assert [(len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == [(1, 0.5), (1, 0.0)]


def test_frozen_parameters_are_not_given_to_the_optimizer():
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    optimizer, _ = prepare_optimizer(model, Pace(0.1, 1), 2)
    assert [parameter for group in optimizer.param_groups for parameter in group["params"]] == [model.bias]
    assert torch.is_tensor(model.bias)


def test_points_lie_at_equal_shares_and_at_both_ends():
    assert even_points(10, 4) == {0, 2, 5, 8, 10}
