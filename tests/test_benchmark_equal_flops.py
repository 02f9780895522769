"""The study at equal FLOPs: arms cost what they are compared at, choices are the best tried, the sums are right."""

import json
import math
import shutil

import pytest

from benchmarks.equal_flops import TINY, best_of_grid, main
from benchmarks.equal_flops_report import crossing, dense_after, differences, losses
from moe_hf.errors import MoEError


ARMS = ("dense", "2_16", "k1_4", "k1_8")
ARGUMENTS = ["--tiny", "--seeds", "2", "--arms", ",".join(ARMS)]


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("equal_flops") / "out"


@pytest.fixture(scope="module")
def results(output_dir) -> dict:
    return main([*ARGUMENTS, "--out", str(output_dir)])


def made_up(dense: list[list[float]], moe: list[list[float]], pace: float = 1.0) -> dict:
    """Results of runs of 100, 1,000, 10,000 ... tokens with the given losses, one list per seed."""

    def arm(by_seed: list[list[float]], seconds: float) -> dict:
        runs = [
            [{"tokens": 100 * 10**place, "points": [{"loss": {"all": loss}}]} for loss in of_length]
            for place, of_length in enumerate(zip(*by_seed, strict=True))
        ]
        return {"step_seconds": seconds, "runs": runs}

    return {"arms": {"dense": arm(dense, 1.0), "moe": arm(moe, pace)}}


def test_a_token_costs_what_it_costs_the_dense_model_and_its_routers(results):
    arms, layers, width = results["arms"], TINY["num_hidden_layers"], TINY["hidden_size"]
    for name, experts in (("2_16", 16), ("k1_8", 8)):
        extra = arms[name]["forward_flops_per_token"] - arms["dense"]["forward_flops_per_token"]
        assert extra == 2 * layers * width * experts


def test_shards_start_at_the_loss_of_the_dense_model_of_their_seed(results):
    for runs in zip(*(results["arms"][name]["runs"] for name in ("dense", "2_16")), strict=True):
        for dense, moe in zip(*runs, strict=True):
            assert dense["seed"] == moe["seed"]
            assert moe["points"][0]["loss"]["all"] == pytest.approx(dense["points"][0]["loss"]["all"], rel=1e-6)
            assert moe["points"][-1]["tokens"] == dense["points"][-1]["tokens"] == dense["tokens"]


def test_chosen_rates_and_balance_are_the_best_of_those_tried_on_other_text(results):
    choices = results["choices"]
    found = [choices["balance"], *(rate for by_tokens in choices["rates"].values() for rate in by_tokens.values())]
    assert set(choices["rates"]) == {"dense", "granular", "k1"}
    for choice in found:
        assert choice["validation"][choice["chosen"]] == min(choice["validation"].values())
    for name, kind in (("dense", "dense"), ("2_16", "granular"), ("k1_4", "k1")):
        for of_length in results["arms"][name]["runs"]:
            for run in of_length:
                assert run["rate"] == choices["rates"][kind][run["tokens"]]["chosen"]
                assert run["validation"] != run["points"][-1]["loss"]["all"]


def test_a_grid_goes_on_where_its_end_is_best_and_stops_at_its_limit():
    assert best_of_grid((1.0, 2.0, 4.0), lambda rate: abs(rate - 2))["chosen"] == 2
    found = best_of_grid((1.0, 2.0, 4.0), lambda rate: abs(math.log2(rate) + 1))
    assert (found["chosen"], list(found["validation"])) == (0.5, [0.25, 0.5, 1, 2, 4])
    assert list(best_of_grid((1.0, 2.0), lambda rate: -rate)["validation"]) == [1, 2, 4, 8, 16]
    assert best_of_grid((3.0,), lambda rate: rate)["chosen"] == 3


def test_a_crossing_is_where_the_difference_changes_sign_for_good():
    # +1, -1, -1 and +3, -1, -1: half and three quarters of the first decade.
    found = crossing(made_up([[5, 5, 5], [5, 5, 5]], [[6, 4, 4], [8, 4, 4]]), "moe")
    assert found["per_seed"] == pytest.approx([10**2.5, 10**2.75])
    # Below, above and below again crosses once, in the last decade.
    assert crossing(made_up([[5, 5, 5]], [[4, 6, 4]]), "moe")["tokens"] == pytest.approx(10**3.5)
    assert crossing(made_up([[5, 5], [5, 5]], [[6, 4], [6, 6]]), "moe") is None
    assert crossing(made_up([[5, 5]], [[4, 4]]), "moe") is None


def test_equal_time_reads_the_dense_curve_where_the_moe_was_when_its_time_was_over():
    results = made_up([[6, 4, 2]], [[5.5, 3.5, 1.5]], pace=10.0)
    assert dense_after(results, 10**2.5, 0) == pytest.approx(5)
    assert dense_after(results, 10**4.5, 0) is None
    found = differences(results, "moe")
    assert [value["equal_tokens"]["mean"] for value in found] == [-0.5, -0.5, -0.5]
    assert [value["equal_time"] and value["equal_time"]["mean"] for value in found] == [1.5, 1.5, None]


def test_second_run_does_only_what_is_missing_and_writes_the_same(results, output_dir):
    missing = next((output_dir / "seed1/2_16").iterdir())
    shutil.rmtree(missing)
    again = main([*ARGUMENTS, "--out", str(output_dir)])
    assert again["built"] == [missing.relative_to(output_dir).as_posix()]
    assert (losses(again["arms"]["2_16"]) == losses(results["arms"]["2_16"])).all()
    assert json.loads((output_dir / "results.json").read_text(encoding="utf-8")) == json.loads(json.dumps(again))
    assert (output_dir / "curves.png").read_bytes()[:4] == b"\x89PNG"
    table = (output_dir / "table.md").read_text(encoding="utf-8")
    assert all(arm["title"] in table for arm in again["arms"].values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--seeds", "0"], "--seeds is 0"),
        (["--arms", "dense,two"], "--arms has 'two'"),
        (["--arms", "dense,2_32"], "--arms lacks 2_16"),
        (["--arms", "2_16"], "--arms lacks dense"),
        (["--lengths", "many"], "--lengths is 'many'"),
        (["--lengths", "3"], "a step has 512 tokens"),
    ],
)
def test_a_study_that_cannot_be_run_is_refused_before_anything_is_written(arguments, said, tmp_path):
    with pytest.raises(MoEError, match=said):
        main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
