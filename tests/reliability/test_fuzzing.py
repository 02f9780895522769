"""Readers of configurations, indexes, manifests and recipes raise `MoEError` or succeed, whatever they are given.

Derandomised and small here; `MOE_HF_FUZZ_SECONDS=600` lets each reader run for that long on new input.
"""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_hf import MoEConfig, MoEError
from moe_hf.checksums import safetensors_header
from moe_hf.inspection import load_config
from moe_hf.saving import MANIFEST_NAME, check_shard_index, verify_manifest
from tests.tiny_models import tiny_config


SECONDS = float(os.environ.get("MOE_HF_FUZZ_SECONDS", "0"))
FUZZING = settings(
    max_examples=10**9 if SECONDS else 60,
    derandomize=not SECONDS,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12) | st.just("../x"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
DENSE = tiny_config("llama").to_dict()
OWN = sorted(MoEConfig(text_config=tiny_config("llama")).to_dict())


def _or_error(reader, *arguments, **keywords) -> None:
    with suppress(MoEError):
        reader(*arguments, **keywords)


def _fuzz(test) -> None:
    """The test, until the time that the environment gives is up."""
    end = time.monotonic() + SECONDS

    def timed(value):
        if SECONDS and time.monotonic() > end:
            raise _TimeIsUpError
        test(value)

    return timed


class _TimeIsUpError(BaseException):
    pass


def _write(file: Path, content) -> None:
    file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", errors="replace")


def _run(strategy, test) -> None:
    with suppress(_TimeIsUpError):
        FUZZING(given(strategy)(_fuzz(test)))()


@pytest.mark.timeout(0 if SECONDS else 120)
class TestReaders:
    def test_fields_of_a_configuration(self):
        fields = st.dictionaries(st.sampled_from(OWN), JSON, min_size=1, max_size=3)
        _run(fields, lambda given: _or_error(MoEConfig, **({"text_config": dict(DENSE)} | given)))

    def test_files_of_a_configuration(self, tmp_path):
        ours = MoEConfig(text_config=tiny_config("llama")).to_dict() | {"model_type": "moe_hf"}

        def read(given):
            changes, dense, raw = given
            content = {**ours, "text_config": {**DENSE, **dense}, **changes}
            _write(tmp_path / "config.json", raw if raw is not None else content)
            _or_error(load_config, str(tmp_path))

        changes = st.dictionaries(st.sampled_from(OWN), JSON, max_size=2)
        dense = st.dictionaries(st.sampled_from(sorted(DENSE)), JSON, max_size=2)
        _run(st.tuples(changes, dense, st.none() | st.text(max_size=40)), read)

    def test_indexes(self, tmp_path):
        def read(given):
            _write(tmp_path / "model.safetensors.index.json", given)
            _or_error(check_shard_index, tmp_path)

        _run(JSON | st.text() | st.fixed_dictionaries({"weight_map": JSON | st.dictionaries(st.text(), JSON)}), read)

    def test_manifests(self, tmp_path):
        (tmp_path / "file").write_text("x")

        def read(given):
            _write(tmp_path / MANIFEST_NAME, given)
            _or_error(verify_manifest, tmp_path)

        fact = JSON | st.fixed_dictionaries({"size": JSON | st.just(1), "sha256": JSON})
        names = st.sampled_from(["file", "other", "../x"]) | st.text()
        _run(JSON | st.text() | st.fixed_dictionaries({"files": st.dictionaries(names, fact)}), read)

    def test_headers_of_weights(self, tmp_path):
        file = tmp_path / "x.safetensors"

        def read(given):
            header, length, data = given
            text = json.dumps(header).encode(errors="replace")
            file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
            _or_error(safetensors_header, file)

        fact = JSON | st.fixed_dictionaries({"dtype": st.just("F32"), "shape": JSON, "data_offsets": JSON})
        lengths = st.none() | st.integers(0, 2**64 - 1)
        _run(st.tuples(JSON | st.dictionaries(st.text(), fact), lengths, st.binary(max_size=16)), read)

    def test_recipes(self, tmp_path):
        from moe_hf.trainer.arguments import read_recipe

        file, types = (
            tmp_path / "recipe.yaml",
            {"model": str, "learning_rate": float, "max_steps": int, "x_strategy": str},
        )

        def read(given):
            _write(file, given)
            _or_error(read_recipe, str(file), types)

        names = st.sampled_from(["model", "learning_rate", "max_steps", "x_strategy"]) | st.text(max_size=8)
        scalars = st.sampled_from(
            ["2001-99-99", "!!python/object:x.Y {}", "!!int x", "1" * 5000, "&a [*a]", "{? [a] : b}"]
        )
        lines = st.builds(lambda name, value: f"{name}: {value}\n", names, scalars | st.text(max_size=8))
        _run(st.text() | lines | JSON | st.dictionaries(names, JSON, max_size=4), read)
