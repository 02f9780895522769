"""The benchmark of `upcycle_checkpoint` runs at a very small size and tells what it says it tells."""

import json

import pytest

from benchmarks.upcycle import SIZES, bound, main, summary


def test_ratios_are_of_one_round_and_the_peak_is_the_worst():
    common = {
        "way": "copy",
        "experts": 4,
        "bytes": 10,
        "load": 0.0,
        "imports": 1,
        "cpu": 1.0,
        "cp_cpu": 1.0,
        "flush": 1.0,
    }
    measured = [
        common | {"seconds": s, "cp": cp, "peak": p} for s, cp, p in ((1.0, 2.0, 5), (9.0, 3.0, 7), (2.0, 2.0, 6))
    ]
    (row,) = summary(measured, "tiny", {"sha256": 1e9, "gaussians": 1e9})
    assert row["over_cp"] == 1.0 and row["over_cp_range"] == [0.5, 3.0]
    assert (row["seconds"], row["cp_seconds"], row["peak"]) == (2.0, 2.0, 7)


def test_the_bound_is_the_disks_or_the_processors(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    expert = 3 * 64 * 160 * 2
    assert SIZES["tiny"] == {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "vocab_size": 1000}
    figures = {"way": "copy", "experts": 4, "bytes": 10 * expert, "cp_cpu": 3.0, "flush": 0.5}
    rate = {"sha256": float(expert), "gaussians": expert / 2}
    # 3 of 4 experts of 2 bytes a number are not hashed again; 2 cores.
    assert bound(figures, "tiny", rate) == ((10 - 6) + 3.0) / 2
    assert bound(figures | {"way": "noise"}, "tiny", rate) == (10 + 4 * 2 + 3.0) / 2
    assert bound(figures | {"flush": 99.0}, "tiny", rate) == 99.0


@pytest.mark.slow
def test_each_way_is_measured_in_a_process_of_its_own(tmp_path, capsys):
    out = tmp_path / "figures.json"
    main(["--folder", str(tmp_path), "--size", "tiny", "--experts", "4", "--rounds", "1", "--json", str(out)])
    figures = json.loads(out.read_text())
    assert [row["way"] for row in figures["summary"]] == ["copy", "noise", "copy, verified", "copy, in memory"]
    assert all(row["seconds"] > 0 and row["peak"] > 0 for row in figures["summary"])
    assert "over cp" in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["figures.json"]
