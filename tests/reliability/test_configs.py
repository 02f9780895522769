"""A configuration that cannot be right is one `MoEError` that names the field, before any memory is taken (C1 to C22)."""

import json
import math

import pytest

from moe_hf import MoEConfig, MoEError
from moe_hf.inspection import load_config
from moe_hf.weight_checks import check_structure
from tests.reliability.folders import changed_json
from tests.tiny_models import tiny_config


FIELDS = {
    "C1 more experts per token than experts": ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
    "C2 none per token": ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    "C3 fewer than none": ({"num_experts_per_tok": -1}, "num_experts_per_tok is -1"),
    "C4 no experts": ({"num_experts": 0}, "num_experts is 0"),
    "C5 half an expert": ({"num_experts": 2.5}, "num_experts"),
    "C5 experts as text": ({"num_experts": "4"}, "num_experts"),
    "C5 experts as a truth": ({"num_experts": True}, "num_experts"),
    "C6 negative capacity": ({"capacity_factor": -1.0}, "capacity_factor is -1.0"),
    "C6 no capacity": ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
    "C6 capacity that is no number": ({"capacity_factor": math.nan}, "capacity_factor is nan"),
    "C6 infinite capacity": ({"capacity_factor": math.inf}, "capacity_factor is inf"),
    "C7 coefficient that is no number": ({"router_aux_loss_coef": math.nan}, "router_aux_loss_coef is nan"),
    "C7 negative coefficient": ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef is -0.1"),
    "C8 negative z": ({"router_z_loss_coef": -0.1}, "router_z_loss_coef is -0.1"),
    "C9 negative jitter": ({"router_jitter_noise": -0.1}, "router_jitter_noise is -0.1"),
    "C9 jitter of one": ({"router_jitter_noise": 1.0}, "router_jitter_noise is 1.0"),
    "C14 misspelt": ({"num_expert": 4}, "no field 'num_expert'; the nearest is 'num_experts'"),
    "C15 layer outside": ({"mlp_only_layers": [0, 7]}, "mlp_only_layers names layers"),
    "C21 from the future": ({"format_version": 99}, "format_version is 99"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_that_cannot_be_right_is_named(case):
    fields, message = FIELDS[case]
    with pytest.raises(MoEError, match=message):
        MoEConfig(**({"text_config": tiny_config("llama")} | fields))


def test_one_expert_is_allowed():
    assert MoEConfig(text_config=tiny_config("llama"), num_experts=1, num_experts_per_tok=1).num_experts == 1


DENSE_FIELDS = {
    "C10 width that heads do not divide": {"hidden_size": 50, "head_dim": None},
    "C11 heads that key-value heads do not divide": {"num_key_value_heads": 4},
    "C13 unknown activation": {"hidden_act": "no_such_activation"},
}


@pytest.mark.parametrize("case", DENSE_FIELDS)
def test_a_dense_field_that_no_model_can_have_is_one_error(ours, copy, case):
    changed_json(copy / "config.json", lambda config: config["text_config"].update(DENSE_FIELDS[case]))
    with pytest.raises(MoEError):
        check_structure(copy)


FILES = {
    "C17 a list": b"[]",
    "C17 empty": b"",
    "C17 no utf-8": b"\xff\xfe{}",
    "C17 an empty object": b"{}",
    "C18 nested a hundred thousand times": b'{"model_type": "moe_hf", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "C19 NaN as a count": b'{"model_type": "moe_hf", "text_config": {"model_type": "llama"}, "num_experts": NaN}',
    "C19 infinite factor": b'{"model_type": "moe_hf", "text_config": {"model_type": "llama"}, "capacity_factor": Infinity}',
    "no family": b'{"model_type": "moe_hf", "text_config": {}}',
    "unknown family": b'{"model_type": "moe_hf", "text_config": {"model_type": "no_such_family"}}',
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_configuration_is_one_error(tmp_path, case):
    (tmp_path / "config.json").write_bytes(FILES[case])
    with pytest.raises(MoEError):
        load_config(str(tmp_path))


def test_a_key_that_stands_twice_counts_once_and_is_checked(tmp_path):
    # C20: JSON readers take the last one.
    (tmp_path / "config.json").write_text(
        '{"model_type": "moe_hf", "text_config": {"model_type": "llama"}, "num_experts": 4, "num_experts": 0}'
    )
    with pytest.raises(MoEError, match="num_experts is 0"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "is_dense"),
    [("num_experts", False), ("num_hidden_layers", True), ("hidden_size", True), ("vocab_size", True)],
)
def test_sizes_beyond_the_files_are_refused_before_memory_is_taken(copy, field, is_dense):
    # C22
    def enlarge(config):
        (config["text_config"] if is_dense else config)[field] = 10**12

    changed_json(copy / "config.json", enlarge)
    with pytest.raises(MoEError, match=f"{field} is 1,000,000,000,000|The hidden size"):
        check_structure(copy)


def test_what_is_saved_is_strict_json(ours):
    def refuse(constant):
        raise AssertionError(constant)

    json.loads((ours / "config.json").read_text(), parse_constant=refuse)
