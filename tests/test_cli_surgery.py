"""The commands that make another model from a MoE: they do what the functions do, and say what changed."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from moe_hf.cli import app
from moe_hf.data import builtin_prose, train_tokenizer
from moe_hf.upcycling.verification import relative_error
from tests.closeness import bitwise, close
from tests.tiny_models import random_ids, tiny_dense


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dense checkpoint and a MoE of it with noise."""
    root = tmp_path_factory.mktemp("surgery")
    tiny_dense("llama").save_pretrained(root / "dense")
    result = run("upcycle", root / "dense", root / "moe", "--num-experts", 4, "--noise", 0.3)
    assert result.exit_code == 0, result.output
    return root / "dense", root / "moe"


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def made(result, folder):
    """The saved model and the printed error; checks that the command succeeded."""
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model, float(re.search(r"differ by (\S+) ", result.output).group(1))


@torch.no_grad()
def logits(model):
    return model(random_ids()).logits


def test_grown_model_computes_the_same(folders, tmp_path):
    model, error = made(run("grow-experts", folders[1], tmp_path / "out", "--noise", 0.2), tmp_path / "out")
    assert error <= 1e-6
    assert (model.config.num_experts, model.config.num_experts_per_tok) == (8, 4)
    assert relative_error(logits(model), logits(AutoModelForCausalLM.from_pretrained(folders[1]))) <= 1e-6


@pytest.mark.numerics
def test_experts_are_added_removed_and_replaced(folders, tmp_path):
    dense, moe = folders
    sources = ("--from", 1, "--from", f"{moe}:2")
    model, error = made(run("add-experts", moe, tmp_path / "more", *sources, "--router-noise", 0.1), tmp_path / "more")
    assert model.config.num_experts == 6 and error > 0
    experts = model.model.layers[0].mlp.experts.down_proj
    assert torch.equal(experts[4], experts[1]) and torch.equal(experts[5], experts[2])
    model, error = made(
        run("add-experts", moe, tmp_path / "dense", "--from", dense, "--router-rows", "normal"), tmp_path / "dense"
    )
    assert model.config.num_experts == 5 and error > 0
    back, _ = made(
        run("remove-experts", tmp_path / "more", tmp_path / "back", "--expert", 4, "--expert", 5), tmp_path / "back"
    )
    original = AutoModelForCausalLM.from_pretrained(moe)
    assert bitwise(back.state_dict(), original.state_dict()) and close(logits(back), logits(original))
    assert [step["operation"] for step in back.config.upcycling["surgery"]] == ["add_experts", "remove_experts"]
    new, _ = made(run("replace-experts", moe, tmp_path / "new", "--with", "0=3"), tmp_path / "new")
    experts = new.model.layers[2].mlp.experts.down_proj
    assert torch.equal(experts[0], experts[3])


@pytest.mark.numerics
def test_dense_model_comes_back(folders, tmp_path):
    dense = AutoModelForCausalLM.from_pretrained(folders[0])
    assert run("upcycle", folders[0], tmp_path / "copies", "--num-experts", 4).exit_code == 0
    for method in ("average", "merged"):
        model, error = made(
            run("to-dense", tmp_path / "copies", tmp_path / method, "--method", method), tmp_path / method
        )
        assert type(model) is type(dense) and error <= 1e-6
        assert bitwise(model.state_dict(), dense.state_dict()) and close(logits(model), logits(dense))
    _, error = made(
        run("to-dense", folders[1], tmp_path / "one", "--method", "expert", "--expert", 2), tmp_path / "one"
    )
    assert error > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("grow-experts", "MOE", "OUT", "--copies", 1), "at least 2"),
        (("add-experts", "MOE", "OUT", "--from", 9), "0 to 3"),
        (("add-experts", "MOE", "OUT", "--from", "nowhere/x:1"), "nowhere"),
        (("add-experts", "DENSE", "OUT", "--from", 1), "MoEForCausalLM"),
        (("remove-experts", "MOE", "OUT", "--expert", 4), "0 to 3"),
        (("replace-experts", "MOE", "OUT", "--with", "1"), "ID=SOURCE"),
        (("to-dense", "MOE", "OUT", "--method", "best"), "must be one of"),
        (("to-dense", "MOE", "MOE"), "exists"),
    ],
)
def test_mistakes_are_one_message_and_write_nothing(arguments, message, folders, tmp_path):
    places = {"DENSE": folders[0], "MOE": folders[1], "OUT": tmp_path / "out"}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split()) and "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_surgery_prints_the_loss_before_and_after(folders, tmp_path):
    """Without a tokenizer it says that there is none."""
    said = run("remove-experts", folders[1], tmp_path / "less", "--expert", 1)
    assert said.exit_code == 0 and "loss on text: not measured, since there is no tokenizer" in said.output
    tokenizer = train_tokenizer(builtin_prose().select(range(4)), 300)
    tiny_dense("llama", vocab_size=300).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "mine.txt").write_text("one two three " * 300)
    assert run("upcycle", tmp_path / "dense", tmp_path / "moe", "--num-experts", 4).exit_code == 0
    for command, *options in (["grow-experts"], ["remove-experts", "--expert", 1], ["to-dense"]):
        said = run(command, tmp_path / "moe", tmp_path / command, *options, "--data", tmp_path / "mine.txt")
        assert said.exit_code == 0, said.output
        before, after = re.search(r"loss on text: (\S+) before, (\S+) after.*\(mine.txt, ", said.output).groups()
        assert float(before) == pytest.approx(float(after), abs=2e-3)
