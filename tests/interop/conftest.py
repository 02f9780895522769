"""Fixtures of `make interop`, and what keeps `make test` from installing the tools."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.interop import results
from tests.interop.models import Checkpoint, export, make_ours


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
def qwen3(tmp_path_factory) -> Checkpoint:
    """Ours, from a Qwen3."""
    return make_ours(tmp_path_factory.mktemp("qwen3") / "moe", "qwen3")


@pytest.fixture(scope="session")
def mixtral(llama, tmp_path_factory) -> Checkpoint:
    """`llama`, exported."""
    return export(llama, tmp_path_factory.mktemp("native") / "mixtral", "mixtral")


@pytest.fixture(scope="session")
def qwen3_moe(qwen3, tmp_path_factory) -> Checkpoint:
    """`qwen3`, exported."""
    return export(qwen3, tmp_path_factory.mktemp("native") / "qwen3_moe", "qwen3_moe")


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
