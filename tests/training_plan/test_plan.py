"""`plan_training`: what it says of layouts, when it says that they fit, and what it proposes when they do not."""

import json

import pytest
from typer.testing import CliRunner

from moe_hf import MoEError, plan_training, upcycle
from moe_hf.cli import app
from tests.tiny_models import tiny_config, tiny_dense, tiny_native_moe


SETTINGS = {"batch": 4, "sequence": 32, "gpus": 2, "scope": "all", "dtype": "fp32"}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    tiny_config("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    path = tmp_path_factory.mktemp("ours")
    upcycle(tiny_dense("llama"), num_experts=4).config.save_pretrained(path)
    return path


def layouts(plan):
    return {one.layout: one for one in plan.layouts}


def test_a_dense_source_is_planned_as_the_moe_that_it_becomes(dense, ours):
    theirs, own = plan_training(dense, num_experts=4, **SETTINGS), plan_training(ours, **SETTINGS)
    assert theirs.layouts == own.layouts and set(layouts(own)) == {"DDP", "FSDP2", "EP+FSDP2"}


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_native_models_are_planned(family, tmp_path):
    model = tiny_native_moe(family)
    model.config.save_pretrained(tmp_path)
    found = layouts(plan_training(tmp_path, **SETTINGS))
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert found["DDP"].gradients == found["DDP"].buffers == size
    assert found["FSDP2"].gradients == found["EP+FSDP2"].gradients == size // 2


def test_traffic_is_that_of_the_formulas(ours):
    plan = plan_training(ours, **SETTINGS | {"gpus": 4})
    found = layouts(plan)
    # 3 layers, 128 tokens of width 48 to 2 experts each, 3 of 4 elsewhere, there and back, forward and backward.
    assert found["EP+FSDP2"].all_to_all == 3 * 128 * 2 * 48 * 4 * 3 // 4 * 4
    assert found["DDP"].all_to_all == found["FSDP2"].all_to_all == 0
    assert found["DDP"].reduction == 2 * found["DDP"].gradients * 3 // 4
    assert found["FSDP2"].reduction == 3 * found["DDP"].gradients * 3 // 4
    assert found["EP+FSDP2"].reduction < found["FSDP2"].reduction
    more = layouts(plan_training(ours, **SETTINGS | {"gpus": 4, "checkpointing": True, "accumulation": 3}))
    assert more["EP+FSDP2"].all_to_all == round(1.5 * 3 * found["EP+FSDP2"].all_to_all)
    assert more["DDP"].reduction == found["DDP"].reduction


def test_expert_parallelism_needs_experts_that_divide(ours):
    plan = plan_training(ours, **SETTINGS | {"gpus": 3})
    assert "4 experts cannot be divided among 3" in layouts(plan)["EP+FSDP2"].why_not
    assert not plan.fits(layouts(plan)["EP+FSDP2"]) and plan.fits(layouts(plan)["DDP"])


def test_the_cheapest_change_fits_and_nothing_cheaper_does(ours):
    given = SETTINGS | {"gpus": 1}
    (whole,) = plan_training(ours, **given).layouts
    halved = plan_training(ours, **given | {"batch": 2, "accumulation": 2}).layouts[0].total
    assert halved < whole.total
    plan = plan_training(ours, **given, memory=(halved + whole.total) / 2 / 0.92 / 2**30)
    assert not plan.fits(plan.layouts[0]) and plan.change.layout.total == halved
    assert plan.change.describe(plan.settings) == "DDP, batch 2 with accumulation 2"
    # Weights, gradients and moments alone are too much for one: more devices.
    plan = plan_training(ours, **given, memory=0.75 * 16 / 4 * whole.weights / 0.92 / 2**30)
    assert plan.change.settings.gpus > 1 and plan.change.layout.layout != "DDP"
    assert plan_training(ours, **given, memory=1e-6).change is None


def test_a_load_gives_a_proposal_for_each_layer(ours, tmp_path):
    counts = [[90, 80, 10, 20], [50, 50, 50, 50], [10, 20, 80, 90]]
    (tmp_path / "load.json").write_text(json.dumps(counts))
    given = SETTINGS | {"batch": 1, "sequence": 4}
    plan = plan_training(ours, **given, load=tmp_path / "load.json")
    assert plan.placement == plan_training(ours, **given, load=counts).placement
    assert [round(one.imbalance_before, 2) for one in plan.placement] == [1.7, 1.0, 1.7]
    assert [round(one.imbalance_after, 2) for one in plan.placement] == [1.0, 1.0, 1.0]
    with pytest.raises(MoEError, match="the model has 3 MoE layers of 4 experts"):
        plan_training(ours, **given, load=counts[:2])
    (tmp_path / "load.json").write_text("{}")
    with pytest.raises(MoEError, match="list of layers, each a list of counts"):
        plan_training(ours, **given, load=tmp_path / "load.json")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"optimizer": "adam"}, "optimizer='adam'"),
        ({"num_experts": 4}, "has experts already"),
        ({"scope": "everything"}, "scope"),
    ],
)
def test_settings_that_mean_nothing_are_refused(arguments, said, ours):
    with pytest.raises(MoEError, match=said):
        plan_training(ours, **SETTINGS | arguments)


def test_the_command_prints_the_plan(dense, tmp_path):
    arguments = ["plan", str(dense), "--experts", "4", "--gpus", "2", "--batch", "2", "--seq", "16"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "EP+FSDP2" in result.output and "fits" in result.output
    result = CliRunner().invoke(app, [*arguments, "--memory", "0.0000001", "--json"])
    figures = json.loads(result.output)
    assert figures["change"] is None and not any(one["fits"] for one in figures["layouts"])
    refused = CliRunner().invoke(app, [*arguments, "--optimizer", "lion"])
    assert refused.exit_code == 2 and "choose one of adamw, sgd" in refused.output
