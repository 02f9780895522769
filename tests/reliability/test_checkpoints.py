"""Damaged or strange weight files are one `MoEError` before a model is made of them (K1 to K24)."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_hf import MoEConfig, MoEError, MoEForSequenceClassification, MoEModel
from moe_hf.cli.app import load_model
from moe_hf.saving import verify_manifest, write_manifest
from moe_hf.weight_checks import check_finite_weights, check_structure
from tests.reliability.folders import INDEX, changed_json, changed_tensors, first_shard, with_header
from tests.tiny_models import tiny_config


def _point_to(name):
    def change(folder: Path) -> None:
        def redirect(index):
            first = next(iter(index["weight_map"]))
            index["weight_map"][first] = name

        changed_json(folder / INDEX, redirect)

    return change


def _header(change=None, length=None):
    return lambda folder: with_header(first_shard(folder), change, length)


def _first(header):
    return next(fact for name, fact in header.items() if name != "__metadata__")


def _drop_a_tensor(folder: Path) -> None:
    changed_tensors(folder, lambda tensors: tensors.pop(next(iter(tensors))))


def _of_whole_numbers(folder: Path) -> None:
    changed_tensors(folder, lambda tensors: tensors.update({n: t.to(torch.int32) for n, t in tensors.items()}))


def _listed_and_extra(folder: Path) -> None:
    shard = changed_tensors(folder, lambda tensors: tensors.update({"model.extra.weight": torch.ones(3)}))
    changed_json(folder / INDEX, lambda index: index["weight_map"].update({"model.extra.weight": shard.name}))


def _unlisted(folder: Path) -> None:
    def change(index):
        del index["weight_map"][next(iter(index["weight_map"]))]

    changed_json(folder / INDEX, change)


DAMAGES = {
    "K1 missing shard": (lambda folder: first_shard(folder).unlink(), "is missing"),
    "K2 truncated shard": (lambda f: os.truncate(first_shard(f), first_shard(f).stat().st_size - 9), "is truncated"),
    "K3 empty shard": (lambda folder: first_shard(folder).write_bytes(b""), "is truncated"),
    "K4 random bytes": (lambda f: first_shard(f).write_bytes(bytes(range(256)) * 64), "truncated|no safetensors file"),
    "K5 header of 2^60 bytes": (_header(length=2**60), "truncated|declares a header"),
    "K6 offsets that overlap": (_header(lambda h: _first(h).update(data_offsets=[0, 4])), "damaged|overlap|bytes"),
    "K6 offsets that are text": (_header(lambda h: _first(h).update(data_offsets="x")), "no safetensors file"),
    "K8 parent folder": (_point_to("../outside.safetensors"), "outside of its folder"),
    "K9 absolute path": (_point_to("/etc/passwd"), "outside of its folder"),
    "K11 NUL": (_point_to("a\0b"), "a file name is expected"),
    "K11 path of Windows": (_point_to("C:\\weights.safetensors"), "outside of its folder"),
    "K12 a number": (_point_to(7), "a file name is expected"),
    "K13 no weight_map": (lambda f: changed_json(f / INDEX, lambda index: {"metadata": {}}), "weight_map"),
    "K13 empty weight_map": (lambda f: changed_json(f / INDEX, lambda index: {"weight_map": {}}), "weight_map"),
    "K13 no JSON": (lambda f: (f / INDEX).write_text("{"), "not valid JSON"),
    "K14 listed and absent": (_drop_a_tensor, "lacks"),
    "K14 in a shard and not listed": (_unlisted, "lacks"),
    "K15 one too many": (_listed_and_extra, "does not know, 'model.extra.weight'"),
    "K16 fewer experts than promised": (
        lambda f: changed_json(f / "config.json", lambda config: config.update(num_experts=8)),
        "has the shape",
    ),
    "K17 whole numbers": (_of_whole_numbers, "weights are floating-point numbers"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_refused_by_name_before_it_is_loaded(copy, case):
    damage, message = DAMAGES[case]
    damage(copy)
    with pytest.raises(MoEError, match=message):
        load_model(str(copy))


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/../../b", "C:\\x"])
def test_from_pretrained_of_our_models_follows_no_index_out_of_its_folder(copy, name):
    shutil.copyfile(first_shard(copy), copy.parent / "outside.safetensors")
    _point_to(name)(copy)
    with pytest.raises(MoEError, match="outside of its folder"):
        AutoModelForCausalLM.from_pretrained(copy)


def test_whole_checkpoints_pass_every_check(ours):
    check_structure(ours)
    check_finite_weights(ours)
    assert AutoModelForCausalLM.from_pretrained(ours).config.num_experts == 4


def test_a_flipped_bit_is_found_by_the_manifest_and_an_edited_card_is_none(copy):
    # K7
    (copy / "README.md").write_text("# card")
    write_manifest(copy)
    (copy / "README.md").write_text("# edited card")
    verify_manifest(copy)
    content = bytearray(first_shard(copy).read_bytes())
    content[-1] ^= 1
    first_shard(copy).write_bytes(content)
    with pytest.raises(MoEError, match="is changed"):
        verify_manifest(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_one_number_that_is_not_finite_is_found_by_name(copy, value, dtype):
    # K18
    def spoil(tensors):
        name = next(iter(tensors))
        tensors[name] = tensors[name].to(dtype)
        tensors[name].view(-1)[-1] = value

    file = changed_tensors(copy, spoil)
    with pytest.raises(MoEError, match=f"{file.name} holds NaN or infinity"):
        check_finite_weights(copy)


def test_verify_names_weights_that_are_not_finite(copy):
    from typer.testing import CliRunner

    from moe_hf.cli import app

    changed_tensors(copy, lambda tensors: next(iter(tensors.values())).fill_(float("nan")))
    result = CliRunner().invoke(app, ["verify", str(copy), str(copy)])
    assert result.exit_code == 2 and "holds NaN or infinity" in result.output


class _Payload:
    def __reduce__(self):
        return os.mkdir, ("payload-ran",)


def test_a_pickle_is_never_run(ours, tmp_path, monkeypatch):
    # K19, K20
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pickled"
    folder.mkdir()
    shutil.copyfile(ours / "config.json", folder / "config.json")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload()))
    with pytest.raises(MoEError, match="cannot be read"):
        load_model(str(folder))
    assert not (tmp_path / "payload-ran").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads any file")
def test_a_file_that_may_not_be_read_is_one_error(copy):
    # K21
    first_shard(copy).chmod(0)
    with pytest.raises((MoEError, OSError)):
        load_model(str(copy))


def test_two_shards_with_one_tensor_use_the_one_of_the_index(copy):
    # K24
    weight_map = json.loads((copy / INDEX).read_text())["weight_map"]
    other = next(name for name in weight_map.values() if name != first_shard(copy).name)
    moved = next(name for name, shard in weight_map.items() if shard == other)
    changed_tensors(copy, lambda tensors: tensors.update({moved: torch.zeros(1)}))
    check_structure(copy)


def test_a_router_of_ones_own_that_is_not_registered_is_no_damage(copy):
    changed_json(copy / "config.json", lambda config: config.update(router_type="somebodys_own", router_kwargs={}))
    check_structure(copy)
    first_shard(copy).unlink()
    with pytest.raises(MoEError, match="is missing"):
        check_structure(copy)


def test_classifiers_and_bare_decoders_fit_their_configurations_too(tmp_path):
    fields = {"text_config": tiny_config("llama", num_hidden_layers=1, num_labels=3), "num_experts": 4}
    for model in (MoEForSequenceClassification, MoEModel):
        folder = tmp_path / model.__name__
        model(MoEConfig(**fields)).save_pretrained(folder)
        check_structure(folder)


@pytest.mark.parametrize("fact", [{"size": None, "sha256": "0"}, {"size": "1", "sha256": "0"}, {"size": 1}, 7])
def test_a_manifest_with_facts_that_are_none_is_damaged(copy, fact):
    manifest = write_manifest(copy)
    changed_json(manifest, lambda content: content["files"].update({"config.json": fact}))
    with pytest.raises(MoEError, match="it is damaged"):
        verify_manifest(copy)


@pytest.mark.parametrize("name", ["x" * 300, "\ud800", "y/" * 3000])
def test_a_name_that_no_file_can_have_is_refused(copy, name):
    _point_to(name)(copy)
    with pytest.raises(MoEError, match="a file name is expected"):
        check_structure(copy)
