"""Exported models are transformers' own, and equal ours; what comes back is what went, bit by bit."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import moe_hf
from moe_hf.interchange import exact_targets, export_native, import_native
from moe_hf.interchange.families import FAMILIES
from tests.families import FAMILIES as DENSE_FAMILIES
from tests.families import VARIANTS
from tests.interchange.cases import EXACT, SIGMOID, Case, files, native_fields, upcycled
from tests.tiny_models import random_ids, tiny_dense


TOLERANCE = 1e-6
TWINS = {dense for family in FAMILIES.values() for dense in family.twins}
# Of the file, or of the way it came; the rest of a config must be equal.
PROVENANCE = {"moe_hf", "transformers_version"}
# What rope_parameters says, for older readers; transformers reads and drops it.
OLDER = {"rope_theta", "rope_scaling", "partial_rotary_factor"}


@dataclass
class Exported:
    """A model of ours that was exported, and what transformers makes of the export."""

    case: Case
    moe: torch.nn.Module
    ours: Path
    folder: Path
    native: torch.nn.Module
    loading: dict


# One dense model for each family is exported in every run of the tests.
FIRST = {case.target: name for name, case in reversed(EXACT.items())}
CASES = [
    pytest.param(case, id=name, marks=() if FIRST[case.target] == name else pytest.mark.slow)
    for name, case in EXACT.items()
]


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory) -> Exported:
    root, case = tmp_path_factory.mktemp("exchange"), request.param
    _, moe = upcycled(case)
    moe.save_pretrained(root / "ours")
    folder = export_native(root / "ours", root / "native", case.target)
    native, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    return Exported(case, moe, root / "ours", folder, native.eval(), loading)


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    return float((expected - actual).norm() / expected.norm())


@torch.no_grad()
def greedy(model) -> torch.Tensor:
    return model.generate(random_ids(2, 12), max_new_tokens=12, do_sample=False, eos_token_id=None)


def config_of(folder: Path) -> dict:
    return {k: v for k, v in json.loads((folder / "config.json").read_text()).items() if k not in PROVENANCE}


def test_export_loads_without_our_code_and_without_a_missing_tensor(exported):
    assert type(exported.native).__module__.startswith("transformers.models.")
    assert exported.native.config.model_type == exported.case.target
    assert {key: value for key, value in exported.loading.items() if value} == {}
    assert not list(exported.folder.glob("*.py"))
    assert "auto_map" not in config_of(exported.folder)


@torch.no_grad()
def test_export_gives_our_logits_and_tokens(exported):
    ids = random_ids()
    expected, actual = exported.moe(ids).logits, exported.native(ids).logits
    assert relative_error(expected, actual) <= TOLERANCE
    assert torch.equal(greedy(exported.moe), greedy(exported.native))


def test_export_is_what_transformers_itself_saves(exported, tmp_path):
    exported.native.save_pretrained(tmp_path)
    expected, actual = load_file(tmp_path / "model.safetensors"), load_file(exported.folder / "model.safetensors")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[name], actual[name]) for name in expected)
    written, own = config_of(exported.folder), config_of(tmp_path)
    assert {k for k in written.keys() | own.keys() if written.get(k) != own.get(k)} <= OLDER


def test_ours_to_native_and_back_is_the_same_checkpoint(exported, tmp_path):
    import_native(exported.folder, tmp_path / "back")
    assert files(tmp_path / "back") == files(exported.ours)
    assert config_of(tmp_path / "back") == config_of(exported.ours)
    ours, back = ({file.name for file in folder.glob("*.py")} for folder in (exported.ours, tmp_path / "back"))
    assert ours == back


def test_native_to_ours_and_back_is_the_same_checkpoint(exported, tmp_path):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes((exported.folder / "model.safetensors").read_bytes())
    (foreign / "config.json").write_text(json.dumps(config_of(exported.folder)))
    ours = import_native(foreign, tmp_path / "ours")
    again = export_native(ours, tmp_path / "again", exported.case.target)
    assert files(again) == files(foreign)
    assert config_of(again) == config_of(foreign)
    model, ids = moe_hf.MoEForCausalLM.from_pretrained(ours).eval(), random_ids()
    with torch.no_grad():
        assert relative_error(exported.native(ids).logits, model(ids).logits) <= TOLERANCE


@pytest.mark.parametrize("target", FAMILIES)
def test_freshly_upcycled_model_gives_the_dense_tokens_after_export(target, tmp_path):
    case = next(case for case in EXACT.values() if case.target == target)
    case = Case(case.dense, target, case.fields, {k: v for k, v in case.moe.items() if k == "scoring_func"})
    dense, moe = upcycled(case, apart=False)
    moe.save_pretrained(tmp_path / "ours")
    native = AutoModelForCausalLM.from_pretrained(export_native(tmp_path / "ours", tmp_path / "native", target))
    assert torch.equal(greedy(dense), greedy(native.eval()))


@torch.no_grad()
@pytest.mark.parametrize("target", FAMILIES)
def test_native_model_that_never_was_ours_is_imported_without_loss(target, tmp_path):
    native = native_model(target)
    native.save_pretrained(tmp_path / "native")
    ours = import_native(tmp_path / "native", tmp_path / "ours")
    model, ids = moe_hf.MoEForCausalLM.from_pretrained(ours).eval(), random_ids()
    assert relative_error(native(ids).logits, model(ids).logits) <= TOLERANCE
    again = export_native(ours, tmp_path / "again", target)
    assert files(again) == files(tmp_path / "native")
    # A class derives fields from others when it is loaded, and writes them out when it is saved again.
    reloaded = AutoConfig.from_pretrained(tmp_path / "native").to_dict() | config_of(tmp_path / "native")
    again = {name: value for name, value in config_of(again).items() if name not in OLDER | {"head_dim"}}
    added = FAMILIES[target].servers_read
    assert {name: value for name, value in again.items() if (added | reloaded)[name] != value} == {}


def test_export_says_what_other_readers_ask_for_and_an_import_does_not_keep_it(tmp_path):
    _, moe = upcycled(EXACT["qwen3-dots1"])
    moe.save_pretrained(tmp_path / "ours")
    folder = export_native(tmp_path / "ours", tmp_path / "native", "dots1")
    assert config_of(folder)["scoring_func"] == "sigmoid"
    back = config_of(import_native(folder, tmp_path / "back"))
    assert "scoring_func" not in back["text_config"] and back["scoring_func"] == "sigmoid"

    fields = json.loads((folder / "config.json").read_text()) | {"scoring_func": "noaux_tc"}
    (folder / "config.json").write_text(json.dumps(fields))
    import_native(folder, tmp_path / "own")
    again = export_native(tmp_path / "own", tmp_path / "again", "dots1")
    assert config_of(again)["scoring_func"] == "noaux_tc"


def native_model(target: str, **overrides):
    """A tiny random native MoE whose bias for choosing, which our router does not have, is zero."""
    extra = {
        "glm4_moe": {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 1.0}, "num_mtp_layers": 0},
        "qwen3_5_moe_text": {"linear_num_key_heads": 3, "linear_key_head_dim": 12, "linear_value_head_dim": 20}
        | {"linear_num_value_heads": 6, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
        "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
        "granitemoe_swa": {"sliding_window": 8},
        "cohere2_moe": {"shared_expert_combination_strategy": "sum", "sliding_window": 8},
    }
    model = tiny_dense(target, **{**extra.get(target, {}), **native_fields(target), **overrides})
    bias = FAMILIES[target].names.correction_bias
    if bias is not None:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(bias.rpartition(".")[2]):
                tensor.data.zero_()
    return model


@pytest.mark.slow
@pytest.mark.parametrize("scoring", [{}, SIGMOID], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "dense", [name for name in (*DENSE_FAMILIES, *VARIANTS) if VARIANTS.get(name, (name,))[0] in TWINS]
)
def test_no_family_is_called_exact_and_is_not(dense, scoring, tmp_path):
    case = Case(dense, "", moe=scoring)
    config = moe_hf.MoEConfig(text_config=case.dense_model().config, **scoring)
    targets = [target for target, reason in exact_targets(config).items() if reason is None]
    if not targets:
        pytest.skip("no native family holds it with this router")
    _, moe = upcycled(case)
    moe.save_pretrained(tmp_path / "ours")
    for target in targets:
        native = AutoModelForCausalLM.from_pretrained(export_native(tmp_path / "ours", tmp_path / target, target))
        ids = random_ids()
        with torch.no_grad():
            assert relative_error(moe(ids).logits, native(ids).logits) <= TOLERANCE, target
