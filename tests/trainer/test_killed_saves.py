"""A run that is killed within a save goes on from the checkpoint before."""

import json
import signal
import sys

import pytest

from tests.processes import launch_once, shared_folder


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = shared_folder(tmp_path_factory, "killed")
    command = [sys.executable, "-m", "tests.trainer.killed_saves", str(folder)]
    launch_once(command, folder / "found.json")
    return json.loads((folder / "found.json").read_text())


def test_each_file_of_a_save_was_cut_off_once(found):
    steps = {kill["step"] for kill in found["killed"]}
    files = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    assert {f"half of {name}" for name in files} <= steps
    opened = ("config.json", "trainer_state.json", "moe_hf_manifest.json", "optimizer_parameters.json")
    assert {f"open {name}" for name in opened} <= steps
    assert {"fsync", "os.rename"} <= steps
    assert all(kill["signal"] == signal.SIGKILL for kill in found["killed"])


def test_killed_save_leaves_the_checkpoint_before_or_a_whole_new_one(found):
    for kill in found["killed"]:
        expected = ["checkpoint-1", *(["checkpoint-2"] if kill["published"] else [])]
        assert kill["folders"] == expected, kill
        assert kill["newest"] == expected[-1], kill
    assert any(kill["background"] for kill in found["killed"])


def test_killed_run_that_is_resumed_is_the_undisturbed_one_bitwise(found):
    assert found["resumed_is_equal"]
    assert found["left"] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
