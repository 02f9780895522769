"""`moe-hf export` and `moe-hf import`: what they print, and how they refuse."""

import pytest
from typer.testing import CliRunner

from moe_hf.cli import app
from tests.interchange.cases import Case, files, upcycled


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command") / "ours"
    upcycled(Case("qwen2", "qwen2_moe"))[1].save_pretrained(folder)
    return folder


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_there_and_back_is_the_same_checkpoint(ours, tmp_path):
    result = run("export", ours, tmp_path / "native", "--to", "auto", "--max-shard-size", "200KB")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"{ours} -> {tmp_path / 'native'}: qwen2_moe"
    assert len(list((tmp_path / "native").glob("model-*"))) > 1
    result = run("import", tmp_path / "native", tmp_path / "back")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == f"{tmp_path / 'native'} -> {tmp_path / 'back'}: qwen2 with experts"
    assert files(tmp_path / "back") == files(ours)


def test_without_an_output_the_targets_are_listed(ours):
    result = run("export", ours)
    assert result.exit_code == 0, result.output
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["qwen2_moe"] == "exact"
    assert lines["glm4_moe"].startswith("no: scoring_func='softmax'")


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("export", "OURS", "OUT", "--to", "mixtral"), "mixtral cannot hold this model exactly"),
        (("export", "OURS", "OUT", "--to", "nothing"), "no target 'nothing'"),
        (("export", "OUT", "OUT"), "is no folder"),
        (("export", "OUT"), "is no folder"),
        (("export", "OURS", "OURS"), "exists"),
        (("import", "OURS", "OUT"), "is a moe_hf model already"),
        (("import", "OURS", "OURS"), "exists"),
    ],
    ids=str,
)
def test_mistake_is_one_message_and_leaves_nothing(ours, tmp_path, command, says):
    places = {"OURS": ours, "OUT": tmp_path / "out"}
    result = run(*(places.get(part, part) for part in command))
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []
