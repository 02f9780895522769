"""A small checkpoint of ours, and folders that are damaged in one way."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_hf import MoEConfig, MoEForCausalLM
from tests.tiny_models import randomise_, tiny_config


INDEX = "model.safetensors.index.json"


def save_ours(folder: Path, max_shard_size: str = "150KB") -> Path:
    """A tiny checkpoint of several shards."""
    model = MoEForCausalLM(MoEConfig(text_config=tiny_config("llama", num_hidden_layers=1), num_experts=4))
    randomise_(model)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    assert (folder / INDEX).is_file()
    return folder


def changed_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Apply `change` to what a file holds; its result, if any, replaces it."""
    content = json.loads(file.read_text())
    result = change(content)
    file.write_text(json.dumps(content if result is None else result))


def changed_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    """Apply `change` to the tensors of the first shard."""
    file = first_shard(folder)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def first_shard(folder: Path) -> Path:
    """The first weight file."""
    return sorted(folder.glob("*.safetensors"))[0]


def with_header(file: Path, change: Callable[[dict[str, Any]], Any] | None = None, length: int | None = None) -> None:
    """Rewrite a safetensors file with a changed header, or with a header that claims another length."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    if change is not None:
        change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content[8 + size :])


@pytest.fixture(scope="session")
def ours(tmp_path_factory):
    """A whole checkpoint; tests copy it."""
    return save_ours(tmp_path_factory.mktemp("reliability") / "ours")


@pytest.fixture
def copy(ours, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(ours, tmp_path / "copy"))
