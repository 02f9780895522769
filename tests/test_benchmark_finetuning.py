"""The benchmark of fine-tuning runs at a very small size: every arm trains what it says, the sums are right."""

import json

import pytest
import torch

from benchmarks.finetuning import ARMS, Arm, main, make_model


# peft 0.21 asks transformers by a name that 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuning")
    small = ["--size", "tiny", "--rounds", "2", "--tokens", "16", "--dtypes", "float32", "--measure", "steps"]
    results = main([*small, "--out", str(folder)])
    assert json.loads((folder / "results.json").read_text()) == results
    assert (folder / "table.md").read_text().count("| selected |") == 2
    return results


def test_every_arm_of_both_kinds_is_measured(results):
    assert [run["kind"] for run in results["steps"]] == ["ours", "mixtral"]
    for run in results["steps"]:
        assert list(run["arms"]) == list(ARMS)
        for row in run["arms"].values():
            assert all(0 < low <= middle <= high for low, middle, high in (row["milliseconds"], row["over all"]))
        assert run["arms"]["all"]["over all"] == [1.0, 1.0, 1.0]


def test_trained_parameters_are_in_proportion(results):
    for run in results["steps"]:
        trained = {name: row["trained"] for name, row in run["arms"].items()}
        assert trained["selected"] * 8 == trained["experts"] and trained["frozen pass"] == 0
        assert trained["moe"] + trained["non_moe"] == trained["all"]


@pytest.mark.parametrize("name", [name for name in ARMS if name != "frozen pass"])
def test_a_step_changes_what_the_arm_trains(name):
    arm = Arm(name, make_model("mixtral", "tiny", torch.float32))
    before = {key: p.detach().clone() for key, p in arm.model.named_parameters()}
    for _ in range(2):  # the first step of an adapter moves one of its factors only
        arm.step(torch.arange(16)[None])
    for key, p in arm.model.named_parameters():
        assert torch.equal(before[key], p) != p.requires_grad, key
