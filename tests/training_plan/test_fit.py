"""`fit_shape`: never above the memory, never smaller with more of it, and refused with what would do."""

import json
import re

import pytest
import torch
from typer.testing import CliRunner

from moe_hf import MoEError, fit_shape, plan_training, upcycle
from moe_hf.cli import app
from moe_hf.inspection import inspect_model
from moe_hf.planning import plan_upcycling
from moe_hf.training_plan.fit import PROCESS_BYTES, parse_memory
from moe_hf.training_plan.shapes import COPIES, EVERY, SHARDS, ladder
from tests.tiny_models import tiny_config, tiny_dense


RUN = {"sequence": 16}
LAYERS = {"num_hidden_layers": 1}
MIB = 2**20


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    path = tmp_path_factory.mktemp("dense")
    tiny_config("llama", **LAYERS).save_pretrained(path)
    return path


def parameters_of(dense, found) -> int:
    return plan_upcycling(dense, **found.shape.arguments()).moe.total_parameters


def test_more_memory_never_gives_a_smaller_model_and_none_is_above_it(dense):
    sizes, shapes = [], []
    for extra in (1, 2, 3, 5, 60):
        found = fit_shape(dense, PROCESS_BYTES + extra * MIB, **RUN)
        assert found.total <= PROCESS_BYTES + extra * MIB
        sizes.append(parameters_of(dense, found))
        shapes.append(found.shape)
    assert sizes == sorted(sizes) and shapes == sorted(shapes)
    assert len(set(shapes)) > 3 and found.larger is None


def test_the_larger_shape_that_is_named_would_not_fit(dense):
    found = fit_shape(dense, PROCESS_BYTES + 3 * MIB, **RUN)
    assert found.larger > found.shape
    plan = plan_upcycling(dense, **found.larger.arguments())
    assert plan.training_bytes["moe"] > 3 * MIB


def test_the_figures_are_those_that_moe_hf_plan_counts(dense):
    found = fit_shape(dense, PROCESS_BYTES + 5 * MIB, **RUN)
    plan = plan_training(dense, dtype="fp32", **RUN, **named(found.shape))
    assert found.total - PROCESS_BYTES == pytest.approx(plan.layouts[0].total, rel=0.05)


def named(shape) -> dict:
    """`plan_training` takes whole copies alone."""
    assert shape.shards == 1
    return {"num_experts": shape.copies, "num_experts_per_tok": 2, "decoder_sparse_step": shape.every}


def test_what_is_refused_names_the_memory_that_does(dense):
    with pytest.raises(MoEError, match="Nothing fits") as refused:
        fit_shape(dense, PROCESS_BYTES + MIB // 2, **RUN)
    enough = re.search(r"needs (\S+GiB)", str(refused.value)).group(1)
    assert fit_shape(dense, enough, **RUN).total <= parse_memory(enough)


def test_figures_are_those_of_the_plan_of_the_same_shape(dense):
    found = fit_shape(dense, PROCESS_BYTES + 3 * MIB, scope="all", dtype="float32", **RUN)
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations + PROCESS_BYTES
    moe = plan_upcycling(dense, **found.shape.arguments()).moe
    assert found.gradients == 4 * moe.total_parameters
    assert found.optimizer == pytest.approx(8 * moe.total_parameters, rel=0.01)
    assert found.logits == 16 * tiny_config("llama").vocab_size * 4


@pytest.mark.parametrize(
    "more", [{"batch": 64}, {"sequence": 1024}, {"scope": "all"}], ids=lambda more: next(iter(more))
)
def test_what_needs_more_gets_no_larger_shape(dense, more):
    memory = PROCESS_BYTES + 120 * MIB
    fitted = fit_shape(dense, memory, **RUN | more)
    assert fitted.shape <= fit_shape(dense, memory, **RUN).shape and fitted.total <= memory


def test_running_needs_less_than_training(dense):
    memory = PROCESS_BYTES + 4 * MIB
    running = fit_shape(dense, memory, scope="none", **RUN)
    assert running.shape > fit_shape(dense, memory, **RUN).shape
    assert running.gradients == running.optimizer == 0 and running.total <= memory


def test_shapes_start_exactly_and_those_that_cannot_are_left_out(tmp_path):
    model = tiny_dense("llama", intermediate_size=45, **LAYERS)  # no two equal parts
    model.config.save_pretrained(tmp_path)
    found = fit_shape(tmp_path, "8GiB", **RUN)
    assert found.shape.shards == 1
    moe = upcycle(model, **found.shape.arguments())
    ids = torch.arange(3, 19)[None]
    torch.testing.assert_close(moe(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    with pytest.raises(MoEError, match="noise"):
        fit_shape(tmp_path, "8GiB", noise=0.1, **RUN)
    assert fit_shape(tmp_path, "8GiB", noise=0.1, allow_inexact=True, **RUN).shape == found.shape


def test_the_order_has_every_shape_once_and_prefers_weights_then_the_first_way_to_cut():
    shapes = ladder(12)
    assert len(shapes) == len(set(shapes)) == len(COPIES) * len(EVERY) * len(SHARDS)
    assert [shape.weights for shape in shapes] == sorted(shape.weights for shape in shapes)
    assert shapes[-1].shards == SHARDS[0] and shapes[-1].weights == shapes[-2].weights
    assert ladder(1) and all(shape.every == 1 for shape in ladder(1))


@pytest.mark.parametrize(
    ("memory", "size"), [("8GiB", 8 * 2**30), ("8 gb", 8 * 10**9), ("1.5gib", 3 * 2**29), ("512MiB", 2**29), (7, 7)]
)
def test_sizes_are_read_in_words(memory, size):
    assert parse_memory(memory) == size


@pytest.mark.parametrize("memory", ["8", "many", "", "-1GiB", "nanGiB", "infGB", 0, -3, True, None, 1.5])
def test_what_is_no_size_is_refused(memory):
    with pytest.raises(MoEError, match="The memory is"):
        parse_memory(memory)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scope": "selected"}, "one of the scopes"),
        ({"scope": "shared"}, "matches no parameter"),
        ({"batch": 0}, "batch is 0"),
        ({"sequence": 1.5}, "sequence is 1.5"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"scope": "none", "checkpointing": True}, "checkpointing"),
        ({"num_experts": 4}, "leave num_experts out"),
        ({"decoder_sparse_step": 2}, "leave decoder_sparse_step out"),
        ({"num_expert": 4}, "num_expert"),
    ],
)
def test_what_cannot_act_is_refused(dense, arguments, message):
    with pytest.raises(MoEError, match=message):
        fit_shape(dense, "8GiB", **arguments)


def test_a_source_with_experts_is_refused(tmp_path):
    upcycle(tiny_dense("llama"), num_experts=2).config.save_pretrained(tmp_path)
    with pytest.raises(MoEError, match="experts already|dense"):
        fit_shape(tmp_path, "8GiB")


def run(*arguments):
    return CliRunner().invoke(app, ["upcycle", *map(str, arguments)])


def test_the_command_makes_the_shape_and_prints_what_was_counted(tmp_path):
    tiny_dense("llama", **LAYERS).save_pretrained(tmp_path / "dense")
    memory = f"{PROCESS_BYTES // MIB + 4}MiB"
    result = run(tmp_path / "dense", tmp_path / "moe", "--fit", memory, "--seq", 16)
    assert result.exit_code == 0, result.output
    found = fit_shape(tmp_path / "dense", memory, sequence=16)
    assert inspect_model(tmp_path / "moe").num_experts == found.shape.num_experts
    assert str(found.shape) in " ".join(result.stdout.split()) and "gradients" in result.stdout
    planned = run(tmp_path / "dense", "--dry-run", "--fit", memory, "--seq", 16, "--json")
    assert json.loads(planned.stdout)["fit"]["total"] == found.total


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scope", "moe"], "--scope would have no effect"),
        (["--batch", 2, "--seq", 8], "--batch, --seq would have no effect"),
        (["--fit", "1GiB", "--num-experts", 4], "leave --num-experts out"),
        (["--fit", "1GiB", "--init", "copy"], "leave --init out"),
        (["--fit", "1GiB", "--preset", "mixtral"], "leave --preset out"),
        (["--fit", "lots"], "The memory is 'lots'"),
    ],
)
def test_options_that_would_have_no_effect_are_refused_and_nothing_is_written(dense, tmp_path, options, message):
    result = run(dense, tmp_path / "out", *options)
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists()
