"""Two processes, one or both killed within a save: all go on from the checkpoint before, and say so."""

import json
import signal
import sys

import pytest

from tests.processes import launch_once, shared_folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What is left, by whether a few kills were made or all kinds."""
    known = {}

    def run(extent: str) -> dict:
        if extent not in known:
            folder = shared_folder(tmp_path_factory, f"killed-pairs-{extent}")
            command = [sys.executable, "-m", "tests.trainer.killed_pairs", str(folder), extent]
            launch_once(command, folder / "found.json", timeout=3000)
            known[extent] = json.loads((folder / "found.json").read_text())
        return known[extent]

    return run


EXTENTS = pytest.mark.parametrize("extent", ["quick", pytest.param("all", marks=pytest.mark.slow)])


@EXTENTS
def test_kill_of_one_or_both_leaves_the_checkpoint_before_and_ends_both(extent, found):
    for kill in found(extent)["killed"]:
        expected = ["checkpoint-1", *(["checkpoint-2"] if kill["published"] else [])]
        assert kill["folders"] == expected and kill["newest"] == expected[-1], kill
        for rank, (end, said) in enumerate(zip(kill["ends"], kill["said"], strict=True)):
            # Where both are to be killed, one may lose the other before it comes that far.
            assert end == -signal.SIGKILL or (end == 1 and "Error" in said), (rank, kill)
        assert -signal.SIGKILL in [kill["ends"][int(rank)] for rank in kill["kills"]], kill


@EXTENTS
def test_all_processes_go_on_from_the_same_checkpoint_and_name_it(extent, found):
    for mode, (whole, killed, damaged) in found(extent)["resumed"].items():
        assert whole["from"] == ["checkpoint-2"] * 2 and whole["ends"] == [0, 0], mode
        assert killed["from"] == ["checkpoint-1"] * 2 and killed["ends"] == [0, 0] and killed["is_equal"], mode
        assert "Resuming from" in killed["said"][0] and "checkpoint-1, whose manifest holds" in killed["said"][0]
        # Published whole, and then damaged.
        assert damaged["from"] == ["checkpoint-1"] * 2 and damaged["ends"] == [0, 0], mode
        assert "Skipping" in damaged["said"][0] and "is truncated" in damaged["said"][0], mode
