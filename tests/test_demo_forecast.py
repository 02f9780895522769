"""The demo of a source says before it starts what it will take, and refuses what there is not."""

import shutil
from types import SimpleNamespace

import psutil
import pytest

from moe_hf.errors import MoEError
from moe_hf.trainer.learning_rates import MEASURED
from tests.tiny_models import tiny_config, tiny_dense
from training.demo.forecast import TOY_RATE, continued_rate, forecast
from training.demo.settings import TINY, Settings


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source")
    tiny_config("llama").save_pretrained(path)
    return str(path)


def settings(source, **fields) -> Settings:
    return Settings(**TINY | fields, source=source)


def test_time_memory_and_disk_are_said_and_grow_with_what_is_asked(source, tmp_path, capsys):
    small = forecast(settings(source), tmp_path, 2)
    said = capsys.readouterr().out
    assert "This will take about" in said and "of memory" in said and "of disk" in said
    large = forecast(settings(source, num_experts=16, seeds=2), tmp_path, 64)
    assert large["memory_bytes"] > small["memory_bytes"] and large["disk_bytes"] > 2 * small["disk_bytes"]
    longer = forecast(settings(source, continued_tokens=100 * TINY["continued_tokens"]), tmp_path, 2)
    assert longer["minutes"] > 5 * small["minutes"]


@pytest.mark.parametrize("what", ["memory", "disk"])
def test_too_little_is_refused_with_both_figures(source, tmp_path, monkeypatch, what):
    little = SimpleNamespace(available=2**20, free=2**10)
    module, name = (psutil, "virtual_memory") if what == "memory" else (shutil, "disk_usage")
    monkeypatch.setattr(module, name, lambda *_: little)
    with pytest.raises(MoEError, match=f"GiB of {what}, and .* GiB are free"):
        forecast(settings(source), tmp_path, 2)


def test_the_rate_is_the_named_one_else_the_measured_one_of_a_source_else_the_toys(source, capsys):
    model = tiny_dense("llama")
    assert continued_rate(settings(source, continued_learning_rate=0.5), model, "all") == 0.5
    assert capsys.readouterr().out == ""
    assert continued_rate(settings(source), model, "all") == MEASURED[0].rates["all"]
    assert "learning rate" in capsys.readouterr().out
    assert continued_rate(settings(None), model, "all") == TOY_RATE
