"""The study of initialisers: every arm runs at a very small size, a second run does nothing twice, the sums are right."""

import json
import math
import shutil
from pathlib import Path

import pytest

from benchmarks.initialisers import ARMS, main
from benchmarks.initialisers_report import SHARES_IN_TABLE, summary
from benchmarks.intervals import spread
from benchmarks.study import TINY
from moe_hf.errors import MoEError


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("study") / "out"


@pytest.fixture(scope="module")
def results(output_dir) -> dict:
    return main(["--tiny", "--seeds", "2", "--out", str(output_dir)])


def curve(results: dict, arm: str, seed: int = 0) -> list[dict]:
    return results["arms"][arm]["runs"][seed]["points"]


def held_out(results: dict, arm: str, point: int, seed: int = 0) -> float:
    return curve(results, arm, seed)[point]["loss"]["all"]


def test_study_trains_every_arm_on_equal_tokens_and_one_on_the_flops_of_copy(results):
    tokens = {name: curve(results, name)[-1]["tokens"] for name in ARMS}
    assert {tokens[name] for name in ARMS if not ARMS[name].equal_flops} == {
        TINY["steps"] * TINY["batch_size"] * TINY["block_size"]
    }
    dense, copy = (curve(results, name)[-1]["training_flops"] for name in ("dense_equal_flops", "copy"))
    one_step = dense / curve(results, "dense_equal_flops")[-1]["step"]
    assert abs(dense - copy) <= one_step / 2
    assert len({results["arms"][name]["runs"][0]["parameters"] for name in ("copy", "drop_0.5", "scratch")}) == 1


def test_function_preserving_arms_start_at_the_loss_of_their_parent_and_the_others_do_not(results):
    for seed in (0, 1):
        parent = held_out(results, "dense", 0, seed)
        for name in ("dense_equal_flops", "copy", "granular"):
            assert held_out(results, name, 0, seed) == pytest.approx(parent, rel=1e-6), name
        for name in ("noise", "drop_0.25", "drop_0.5", "scratch"):
            assert held_out(results, name, 0, seed) != pytest.approx(parent, rel=1e-6), name
    assert held_out(results, "dense", 0, 0) != held_out(results, "dense", 0, 1)


def test_study_differences_are_those_of_the_curves_seed_by_seed(results):
    differences = summary(results["arms"])
    for control in ("copy", "dense"):
        found = differences["drop_0.5"]["minus"][control][-1]["per_seed"]
        expected = [held_out(results, "drop_0.5", -1, seed) - held_out(results, control, -1, seed) for seed in (0, 1)]
        assert found == expected
    assert "copy" not in differences["copy"]["minus"]


def test_study_writes_results_table_and_picture(results, output_dir):
    written = json.loads((output_dir / "results.json").read_text(encoding="utf-8"))
    assert written["arms"] == results["arms"]
    assert str(output_dir) not in json.dumps(written)
    rows = [line for line in (output_dir / "table.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    for arm in ARMS.values():
        assert sum(row.startswith(f"| {arm.title} |") for row in rows) == 2
    (copy_row,) = (row for row in rows if row.startswith("| copy |") and "e+" in row)
    assert f"{summary(results['arms'])['copy']['loss'][-1]['mean']:.4f}" in copy_row.split("|")[-2]
    assert len(copy_row.split("|")) == 6 + len(SHARES_IN_TABLE)
    assert (output_dir / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_second_run_of_the_study_does_only_what_is_missing(results, output_dir):
    assert set(results["built"]) == {"data"} | {f"seed{s}/{name}" for s in (0, 1) for name in ("parent", *ARMS)}
    shutil.rmtree(output_dir / "seed1/noise")
    again = main(["--tiny", "--seeds", "2", "--out", str(output_dir)])
    assert again["built"] == ["seed1/noise"]
    assert [curve(again, name, 1) for name in ARMS] == [curve(results, name, 1) for name in ARMS]
    more = main(["--tiny", "--seeds", "3", "--arms", "dense,copy", "--out", str(output_dir)])
    assert more["built"] == ["seed2/parent", "seed2/dense", "seed2/copy"]


def test_study_of_one_arm_alone_has_a_picture_and_no_differences(results, output_dir):
    alone = main(["--tiny", "--seeds", "1", "--arms", "noise", "--out", str(output_dir)])
    assert curve(alone, "noise") == curve(results, "noise")
    assert summary(alone["arms"])["noise"]["minus"] == {}


def test_run_that_is_stopped_is_done_again(results, output_dir, monkeypatch):
    shutil.rmtree(output_dir / "seed0/copy")
    arguments = ["--tiny", "--seeds", "1", "--arms", "dense,copy", "--out", str(output_dir)]

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("torch.nn.utils.clip_grad_norm_", stop)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert not (output_dir / "seed0/copy").exists()
    assert curve(main(arguments), "copy") == curve(results, "copy")


def test_spread_is_that_of_student():
    found = spread([1.0, 2.0, 3.0])
    assert (found["mean"], found["std"]) == (2.0, 1.0)
    assert found["interval_95"] == pytest.approx(4.302653 / math.sqrt(3))
    assert math.isnan(spread([1.0])["std"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "copy,noize"], "noize"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--steps", "0"], "--steps is 0"),
        (["--tiny", "--steps", "100000"], "take fewer steps"),
    ],
    ids=["arm", "seeds", "steps", "text"],
)
def test_study_refuses_what_it_cannot_do(arguments, message, results, output_dir):
    with pytest.raises(MoEError, match=message):
        main([*arguments, "--out", str(output_dir)])
