"""The benchmark of low memory runs at a very small size, and its figures are those of what it says."""

import json

from benchmarks.memory import ARMS, SCHEMES, main


def test_every_arm_is_measured_and_less_memory_is_less(tmp_path):
    small = [
        "--size",
        "tiny",
        "--rounds",
        "1",
        "--prompt",
        "8",
        "--new_tokens",
        "2",
        "--processes",
        "--out",
        str(tmp_path),
    ]
    results = main(small)
    assert json.loads((tmp_path / "results.json").read_text())["arms"].keys() == results["arms"].keys()
    arms = results["arms"]
    assert list(arms) == list(ARMS)
    held = {name: row["experts"]["cpu"] for name, row in arms.items()}
    assert held["disk, 2 resident"] * 4 == held["disk, 8 resident"] == held["plain"]
    assert held["nf4, double"] < held["nf4"] < held["int8"] < held["plain"] / 3
    assert held["host, 2 resident"] == held["plain"] * 10 / 8
    assert len({row["rest"]["cpu"] for row in arms.values()}) == 1
    for name, row in arms.items():
        assert all(0 < low <= middle <= high for low, middle, high in (row["prompt tokens/s"], row["new tokens/s"]))
        limit = 0.5 if ARMS[name][0] else 1e-6
        assert row["logit error"] <= limit
    # Every expert was there from the second round on.
    assert arms["disk, 8 resident"]["hit rate"] > arms["disk, 2 resident"]["hit rate"]
    for name in SCHEMES:
        experts, linears = results["errors"][name]["experts"], results["errors"][name]["linears"]
        assert abs(experts - linears) <= 1e-4 * linears
    assert (tmp_path / "table.md").read_text().count("| nf4") == 5
