"""What comes in runs nothing, reads nothing outside of its folder, and tells nothing (S1 to S8)."""

import ast
import os
import re
import stat
from pathlib import Path

import jinja2
import pytest
from transformers import AutoModelForCausalLM

from moe_hf import MoEError
from moe_hf.cli.app import load_model, parse_assignments
from moe_hf.saving import atomic_folder, verify_manifest, write_manifest
from tests.hub.clients import tiny_tokenizer
from tests.reliability.folders import changed_json


ROOT = Path(__file__).resolve().parents[2]
SOURCES = [path for part in ("moe_hf", "training", "examples") for path in sorted((ROOT / part).rglob("*.py"))]


def test_code_from_a_checkpoint_is_never_trusted_by_us():
    # S1: looked for as an argument in the parsed source, so that documents may name it.
    trusting = [
        f"{path.name}:{keyword.value.lineno}"
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
        if keyword.arg == "trust_remote_code" and getattr(keyword.value, "value", None) is True
    ]
    assert trusting == []


def test_yaml_and_pickles_are_read_by_safe_readers_only():
    # S5
    unsafe = re.compile(r"yaml\.(?:load|unsafe_load|full_load)\(|pickle\.loads?\(|weights_only=False")
    assert [path for path in SOURCES if unsafe.search(path.read_text())] == []
    with pytest.raises(MoEError, match="cannot be read as a value"):
        parse_assignments("--set", ["x=!!python/object/apply:os.system ['true']"])


def test_code_that_a_checkpoint_names_is_not_run(copy, monkeypatch):
    # S2
    monkeypatch.chdir(copy.parent)
    (copy / "evil.py").write_text("import os\nos.mkdir('evil-ran')\nclass Model: pass\n")
    changed_json(copy / "config.json", lambda config: config.update(auto_map={"AutoModelForCausalLM": "evil.Model"}))
    load_model(str(copy))
    assert not (copy.parent / "evil-ran").exists()


KERNEL_FIELDS = (
    "_attn_implementation",
    "_attn_implementation_internal",
    "attn_implementation",
    "_experts_implementation",
)


@pytest.mark.parametrize("field", KERNEL_FIELDS)
@pytest.mark.parametrize("is_dense", [False, True])
def test_kernels_that_a_configuration_names_are_refused(copy, field, is_dense):
    # S3
    changed_json(
        copy / "config.json",
        lambda config: (config["text_config"] if is_dense else config).update({field: "evil/kernel"}),
    )
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(MoEError, match="'evil/kernel', code from the Hub"):
            load(str(copy))


def test_a_chat_template_cannot_leave_its_sandbox():
    # S4
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(jinja2.exceptions.SecurityError):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "C:\\x", "\\\\host\\x"])
def test_a_manifest_reads_nothing_outside_of_its_folder(tmp_path, name):
    # S6
    (tmp_path / "file").write_text("x")
    manifest = write_manifest(tmp_path)
    changed_json(manifest, lambda content: content["files"].update({name: content["files"]["file"]}))
    with pytest.raises(MoEError, match="outside of its folder"):
        verify_manifest(tmp_path)


def test_nothing_that_is_written_is_open_to_the_world(tmp_path):
    # S8
    old = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "saved") as folder:
            assert not folder.stat().st_mode & stat.S_IWOTH
            (folder / "file").write_text("x")
    finally:
        os.umask(old)
    for path in [tmp_path / "saved", *(tmp_path / "saved").iterdir()]:
        assert not path.stat().st_mode & (stat.S_IWOTH | stat.S_IWGRP)


def test_our_models_keep_their_own_code_where_auto_classes_know_them(copy):
    model = AutoModelForCausalLM.from_pretrained(copy)
    assert type(model).__mro__[1].__module__.startswith("moe_hf.")
