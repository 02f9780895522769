"""What moe_hf says of the versions of other libraries, and what it touches of their private names."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.version import Version

from moe_hf import MoEConfig, MoEForCausalLM, versions
from tests import doors
from tests.modeling.isolated import run_without_moe_hf
from tests.tiny_models import random_ids, randomise_, tiny_config


ROOT = Path(__file__).resolve().parent.parent
CARRYING = {"routing_level": "prefix", "num_experts": 4}
# In a file of its own, so that both environments run the same.
SAVE = """
import sys, torch
from moe_hf import MoEConfig, MoEForCausalLM
from tests.test_versions import CARRYING
from tests.tiny_models import randomise_, tiny_config
model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), **CARRYING))
randomise_(model)
model.save_pretrained(sys.argv[1])
"""
CACHED = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
torch.save(model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True).logits, folder + "/cached.pt")
"""


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return {_normal(pin): version for pin, version in (line.split("==") for line in lines if not line.startswith("#"))}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_is_called_tested_is_what_is_pinned():
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    for name, tested in versions.TESTED.items():
        if name != "torch":
            assert tested == (oldest.get(_normal(name), newest[_normal(name)]), newest[_normal(name)]), name


def test_each_floor_of_the_package_is_pinned_for_the_tests():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    floors = {}
    for requirement in map(Requirement, project["dependencies"]):
        (floors[_normal(requirement.name)],) = (s.version for s in requirement.specifier if s.operator == ">=")
    tested = pins("constraints-oldest.txt") | {"torch": versions.TESTED["torch"][0]}
    assert {name: Version(floor) for name, floor in floors.items()} == {n: Version(v) for n, v in tested.items()}


@pytest.mark.parametrize("name", ["transformers", "torch"])
def test_a_version_that_was_not_tested_is_told_in_one_sentence(name, monkeypatch, recwarn):
    versions.warn_of_untested_versions()
    assert [str(warning.message) for warning in recwarn] == []
    installed = versions.metadata.version
    monkeypatch.setattr(versions.metadata, "version", lambda other: "99.1+cpu" if other == name else installed(other))
    with pytest.warns(UserWarning, match=rf"not tested with {name} 99\.1\+cpu \(tested up to [\d.]+\); .*'{name}<="):
        versions.warn_of_untested_versions()


def test_private_names_are_all_in_the_table_and_the_table_has_no_more():
    unlisted, untouched = doors.unlisted_and_untouched()
    assert unlisted == set(), "docs/versions.md lacks them"
    assert untouched == set(), "docs/versions.md has them, and no code touches them"


def test_private_names_are_there_in_the_installed_libraries():
    assert [name for name in doors.listed() if doors.look_up(name) is None] == []


@pytest.mark.skipif("OTHER_PYTHON" not in os.environ, reason="one environment: make test-oldest runs it with two")
@pytest.mark.parametrize("writer", ["other", "this"])
def test_a_checkpoint_of_one_version_runs_with_its_own_code_in_the_other(writer, tmp_path):
    pythons = {"this": sys.executable, "other": os.environ["OTHER_PYTHON"]}
    reader = pythons["this" if writer == "other" else "other"]
    subprocess.run([pythons[writer], "-c", SAVE, str(tmp_path / "saved")], cwd=ROOT, check=True)
    ids = random_ids(2, 7)
    run_without_moe_hf(CACHED, tmp_path, ids, python=reader)
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama"), **CARRYING)).eval()
    randomise_(model)
    whole = model.generate(
        ids,
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        use_cache=False,
        output_logits=True,
        return_dict_in_generate=True,
    ).logits
    for found, expected in zip(torch.load(tmp_path / "saved" / "cached.pt"), whole, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)
