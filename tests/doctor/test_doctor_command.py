"""The command, its report, its codes, the environment, and the flag of the training programs."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from typer.testing import CliRunner

from moe_hf.cli import app
from moe_hf.doctor import CODES, examine, examine_environment
from moe_hf.doctor.environment import GATES
from moe_hf.doctor.findings import Report, ranges
from moe_hf.doctor.runs import look_at_history
from moe_hf.errors import MoEError
from tests.doctor.faults import found, is_silent, learnt, rewrite, saved


PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("command")
    good, bad, odd = (saved(learnt(), root / name) for name in ("good", "bad", "odd"))

    def spoil(tensors):
        tensors["model.layers.2.block_sparse_moe.experts.5.w2.weight"][0, 0] = torch.inf

    rewrite(bad, spoil)
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    rewrite(odd, lambda t: t | {gate: t[gate] * 0})
    return good, bad, odd


def test_exit_codes_and_json(folders):
    good, bad, odd = folders
    assert [run(folder).exit_code for folder in folders] == [0, 1, 0]
    assert run(odd, "--fail-on", "warning").exit_code == 1
    result = run(bad, "--json", "--base", good)
    finding = json.loads(result.stdout)["findings"][0]
    assert finding["code"] == "not-finite"
    assert finding["where"] == "layer 2, expert 5"
    assert finding["severity"] == "error"
    assert {"figure", "message"} <= finding.keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Nothing to examine"),
        (["/nowhere"], "/nowhere does not exist"),
        (["--environment", "x"], "give one of the two"),
        (["GOOD", "--fail-on", "nothing"], "error, warning or note"),
        (["GOOD", "--adapter", "GOOD"], "base"),
        (["GOOD", "--base", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_mistakes_are_one_sentence(folders, arguments, words):
    result = run(*[folders[0] if argument == "GOOD" else argument for argument in arguments])
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_each_code_has_a_paragraph_and_is_used():
    documented = set(re.findall(r"^\*\*`([a-z0-9-]+)`\*\*", PAGE.read_text(), re.MULTILINE))
    assert documented == CODES.keys()
    source = "\n".join(
        p.read_text() for p in (PAGE.parents[1] / "moe_hf" / "doctor").glob("*.py") if p.name != "codes.py"
    )
    assert [code for code in CODES if f'"{code}"' not in source] == []


def test_the_environment_is_right_here_and_a_wrong_kernel_is_found(monkeypatch):
    report = examine_environment()
    assert not report.errors, report.to_text()
    right = ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, "grouped_mm", lambda *a, **k: right(*a, **k) * 1.01)
    wrong = {finding.part for finding in found(examine_environment(), "self-test")}
    assert {f"experts implementation grouped_mm, {gate}" for gate in GATES} <= wrong


def history(losses, **more):
    return [
        {"step": i + 1, "loss": loss, "grad_norm": 1.0} | {k: v[i] for k, v in more.items()}
        for i, loss in enumerate(losses)
    ]


def test_what_the_logs_of_a_run_tell():
    falling = [5 - 0.3 * i for i in range(12)]
    report = Report("run", "run")
    noise = [loss + 0.05 * (-1) ** i for i, loss in enumerate(falling)]
    look_at_history(report, history(noise, **{"routing/dead_experts": [0, 1] * 6, "aux_loss": noise}), [4, 8])
    assert is_silent(report)
    for code, severity, logs in (
        ("loss-spike", "warning", history([*falling[:6], 9.0, *falling[7:]])),
        ("run-not-finite", "error", history([*falling[:6], float("nan"), *falling[7:]])),
        ("no-gradient-norm", "error", [entry | {"grad_norm": 0.0} for entry in history(falling)]),
        ("balance-loss-silent", "warning", history(falling, aux_loss=[0.02] * 12)),
        ("experts-died", "warning", history(falling, **{"routing/dead_experts": list(range(12))})),
    ):
        report = Report("run", "run")
        look_at_history(report, logs)
        assert found(report, code, severity)


def test_numbers_in_words():
    assert ranges([7, 0, 1, 2, 5]) == "0-2, 5, 7"
    assert ranges([3, 4]) == "3, 4"


def test_arguments_that_do_not_go_with_what_was_given(folders, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(MoEError, match="an adapter was given"):
        examine(tmp_path, data="builtin")
    with pytest.raises(MoEError, match="no model of transformers"):
        examine(torch.nn.Linear(2, 2))
