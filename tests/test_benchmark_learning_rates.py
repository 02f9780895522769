"""The sweep of learning rates runs at a very small size, goes on where it was, and says what its runs gave."""

import json
import shutil

import pytest

from benchmarks.learning_rates import PARTS, best_rate, main
from moe_hf.errors import MoEError


ARGUMENTS = ["--tiny", "--scopes", "moe,ffn,expert_lora", "--rates", "1e-3,3e-2"]


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("rates") / "out"


@pytest.fixture(scope="module")
def results(output_dir):
    return main([*ARGUMENTS, "--out", str(output_dir)])


def test_every_scope_is_trained_at_every_rate_from_the_same_loss(results, output_dir):
    assert list(results["runs"]) == ["moe", "ffn", "expert_lora"]
    for by_rate in results["runs"].values():
        assert list(by_rate) == ["0.001", "0.03"]
        for run in by_rate.values():
            for part in PARTS:
                expected = run["losses"][part]["all"] - results["before"]["losses"][part]["all"]
                assert run["change"][part] == expected != 0
    # The control trains the MLPs of the layers that have experts, one of three here; the MoE four copies and a router.
    trained = {scope: by_rate["0.03"]["trained_parameters"] for scope, by_rate in results["runs"].items()}
    assert trained["moe"] == 4 * trained["ffn"] + 4 * 16
    assert json.loads((output_dir / "results.json").read_text())["runs"] == results["runs"]


def test_the_table_has_the_rate_that_validation_chooses_in_bold(results, output_dir):
    lines = (output_dir / "table.md").read_text().splitlines()
    assert lines[2] == "| rate | moe | ffn | expert_lora |"
    best = {scope: best_rate(by_rate) for scope, by_rate in results["runs"].items()}
    for line in lines[4:]:
        rate, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert [cell.startswith("**") for cell in cells] == [best[scope] == rate for scope in results["runs"]]


def test_a_stopped_sweep_does_only_what_is_missing(results, output_dir, capsys):
    shutil.rmtree(output_dir / "moe" / "0.03")
    assert main([*ARGUMENTS, "--out", str(output_dir)])["runs"].keys() == results["runs"].keys()
    said = capsys.readouterr().out
    assert said.count(": running") == 1 and "moe/0.03: running" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scopes", "moe"], "--model is missing"),
        (["--tiny", "--scopes", "mo"], "--scopes has"),
        (["--tiny", "--rates", "much"], "--rates is 'much'"),
        (["--tiny", "--rates", "0"], "between 0 and 1"),
    ],
)
def test_what_is_no_sweep_is_refused(arguments, message, tmp_path):
    with pytest.raises(MoEError, match=message):
        main([*arguments, "--out", str(tmp_path / "out")])
