"""Names of dtypes are one form everywhere; the short ones mean the same."""

import json

import pytest
import torch
from typer.testing import CliRunner

import moe_hf
from moe_hf import MoEError
from moe_hf.cli import app
from moe_hf.dtypes import SHORT, dtype_name
from tests.tiny_models import tiny_dense


def test_short_and_whole_names_and_dtypes_of_torch_are_the_same():
    for short, whole in SHORT.items():
        assert dtype_name(short, (whole, "auto")) == whole == dtype_name(getattr(torch, whole), (whole, "auto"))
    with pytest.raises(MoEError, match="dtype is 'int8'; it must be auto or float32"):
        dtype_name("int8", ("auto", "float32"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dtypes") / "dense"
    tiny_dense("llama").save_pretrained(folder)
    return folder


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_every_command_takes_them(dense, tmp_path):
    plans = {
        name: command("plan", dense, "--dtype", name, "--seq", 16, "--json").stdout for name in ("bf16", "bfloat16")
    }
    assert plans["bf16"] == plans["bfloat16"] == command("plan", dense, "--seq", 16, "--json").stdout
    assert command("upcycle", dense, tmp_path / "moe", "--num-experts", 2, "--dtype", "bf16").exit_code == 0
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"
    for arguments in (("plan", dense), ("upcycle", dense, tmp_path / "other"), ("upcycle", dense, "--dry-run")):
        result = command(*arguments, "--dtype", "int8")
        assert (result.exit_code, "dtype is 'int8'" in result.output) == (2, True), result.output


def test_a_16_bit_folder_whose_factors_round_is_refused_as_a_model_is(tmp_path):
    model = tiny_dense("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "dense")
    fields = {"num_experts": 2, "shared_expert_intermediate_size": 88, "shared_share": 0.3}
    for call in (
        lambda: moe_hf.upcycle(model, **fields),
        lambda: moe_hf.upcycle_checkpoint(tmp_path / "dense", tmp_path / "moe", **fields),
    ):
        with pytest.raises(MoEError, match=r"multiplied by 0.3, 0.7.*torch.bfloat16 rounds"):
            call()
