"""Fixtures of `make interop`, and what keeps `make test` from installing the tools."""

import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.interop import results
from tests.interop.models import NATIVE, OURS, Checkpoint, export, make_ours


def pytest_ignore_collect(collection_path, config):
    # Without the mark nothing here is asked for, and importing it is time.
    if collection_path.name.startswith("test_") and config.option.markexpr != "interop":
        return True
    return None


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Checkpoint:
    """Ours, from a Llama."""
    return make_ours(tmp_path_factory.mktemp("llama") / "moe", "llama")


@pytest.fixture(scope="session")
def ours(tmp_path_factory) -> dict[str, Checkpoint]:
    """Models that our own code computes, by what they have."""
    return {
        name: make_ours(tmp_path_factory.mktemp("ours") / "moe", family, **fields)
        for name, (family, fields) in OURS.items()
    }


@pytest.fixture(scope="session")
def native(tmp_path_factory) -> Callable[[str], Checkpoint]:
    """`native(family)` is an upcycled model, exported to it."""

    @cache
    def make(family: str) -> Checkpoint:
        dense, fields, moe_fields = NATIVE[family]
        ours = make_ours(tmp_path_factory.mktemp(family) / "moe", dense, fields, **moe_fields)
        return export(ours, ours.folder.parent / "native", family)

    return make


@pytest.fixture
def record(request) -> Callable[..., None]:
    """`record(environment, what, figure)` writes the row of this test."""
    start = time.perf_counter()

    def write(environment, what: str, figure: str) -> None:
        name = Path(request.node.path).stem.removeprefix("test_")
        row = results.row(name, environment, what, figure, time.perf_counter() - start)
        results.write(request.node.nodeid, row)

    return write


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        reason = str(call.excinfo.value).strip().splitlines()[:1]
        name = Path(item.path).stem.removeprefix("test_")
        results.write(item.nodeid, results.row(name, None, item.name, f"FAILED: {' '.join(reason)}", call.duration))
